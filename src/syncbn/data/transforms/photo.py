"""One image of a data set, decoded when and as large as it is asked for."""

import numpy as np

from syncbn.data.datasets.base import ImageDataset, ReadError, applies_orientation, decode_image
from syncbn.data.datasets.decoding import REDUCTIONS, SIDEWAYS, orientation_of
from syncbn.data.datasets.jpeg import find_frame


class Photo:
    """One image of a data set: its size is known at once, its pixels are decoded when asked for.

    Args:
        dataset: Where the image comes from.
        index: Its number there.
        encoded: What ``dataset.encoded(index)`` gives.

    Attributes:
        height: In pixels.
        width: In pixels.
        encoded: The file, or None where there is none.
        reductions: Factors by which the decoder can shrink the image.
        is_plain_jpeg: Whether every decoder of JPEG makes the same of the file: it is grey or RGB, and upright.
    """

    def __init__(self, dataset: ImageDataset, index: int, encoded: bytes | None) -> None:
        self._dataset = dataset
        self._index = index
        self.encoded = encoded
        frame = find_frame(encoded) if encoded else None
        if encoded is None or frame is None or not (frame.height and frame.width):
            self._pixels: np.ndarray | None = self._decode(1)
            self.height, self.width = self._pixels.shape[:2]
            self.reductions: tuple[int, ...] = (1,)
            self.is_plain_jpeg = False
            return
        self._pixels = None
        orientation = orientation_of(encoded) if applies_orientation(dataset) else 1
        sideways = orientation in SIDEWAYS
        self.height, self.width = (frame.width, frame.height) if sideways else (frame.height, frame.width)
        self.reductions = tuple(REDUCTIONS)
        self.is_plain_jpeg = frame.components in (1, 3) and orientation == 1

    @property
    def name(self) -> str:
        """Where the image comes from, for messages."""
        return self._dataset.name(self._index)

    def pixels(self, reduction: int = 1) -> np.ndarray:
        """The image, shrunk by one of `reductions`: uint8, shape (ceil(H / reduction), ..., channels).

        Raises:
            ReadError: The image cannot be decoded; the message names it.
        """
        assert reduction in self.reductions
        if self._pixels is not None:
            return self._pixels
        image = self._decode(reduction)
        expected = (-(-self.height // reduction), -(-self.width // reduction))
        if image.shape[:2] != expected:
            raise ReadError(
                f"the image {self.name} has the size {image.shape[:2]}, where its JPEG header"
                f" promises {expected}: remove or replace the file"
            )
        return image

    def _decode(self, reduction: int) -> np.ndarray:
        if self.encoded is None:
            return self._dataset.image(self._index)
        return decode_image(self.encoded, self._dataset, self._index, reduction)
