"""One image of a data set, decoded when and as large as it is asked for."""

import numpy as np

from syncbn.data.datasets import ImageDataset, ReadError, decode_image
from syncbn.data.decoding import REDUCTIONS, jpeg_size


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
    """

    def __init__(self, dataset: ImageDataset, index: int, encoded: bytes | None) -> None:
        self._dataset = dataset
        self._index = index
        self.encoded = encoded
        size = jpeg_size(self.encoded) if self.encoded else None
        self._pixels = None if size else self._decode(1)
        self.reductions = tuple(REDUCTIONS) if size else (1,)
        self.height, self.width = size or self.pixels().shape[:2]

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
                f"the image {self._dataset.name(self._index)} has the size {image.shape[:2]}, where its JPEG header"
                f" promises {expected}: remove or replace the file"
            )
        return image

    def _decode(self, reduction: int) -> np.ndarray:
        if self.encoded is None:
            return self._dataset.image(self._index)
        return decode_image(self.encoded, self._dataset, self._index, reduction)
