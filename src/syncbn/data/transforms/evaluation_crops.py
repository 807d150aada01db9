"""Which parts of an image are looked at in evaluation: 1 crop, 10, or GoogLeNet's 144."""

from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np

from syncbn.data.transforms.cropping import resize, resize_shorter_side, resized_shape

CROP_COUNTS = (1, 10, 144)

GOOGLENET_SCALES = (256, 288, 320, 352)
"""Shorter sides of the resized image, for crops of 224 pixels (Szegedy et al. 2015, section 7)."""


class View(NamedTuple):
    """One crop of an image.

    Attributes:
        shorter_side: To which the whole image is resized, in pixels.
        top: Of the crop in the resized image, in pixels.
        left: Of the crop in the resized image, in pixels.
        side: Of the crop, a square, in pixels; where the network sees fewer, it is resized again.
        mirrored: Whether left and right change places.
    """

    shorter_side: int
    top: int
    left: int
    side: int
    mirrored: bool


@dataclass(frozen=True)
class EvaluationCrops:
    """The crops of an image, over whose class probabilities is averaged.

    1 is the centre. 10 are the four corners and the centre of the central square, and their mirror images (Krizhevsky
    et al. 2012, section 4.1). 144 are GoogLeNet's: at each of four scales the left, central and right square
    (top, central and bottom if the image is tall), of each the four corners, the centre and the square resized; and
    their mirror images.

    Args:
        image_size: Side of a crop in pixels.
        resize: Pixels of the shorter side, to which the image is resized for 1 and 10 crops. Null for ``image_size``.
            144 crops have four scales of their own in its place.
        count: 1, 10 or 144.

    Raises:
        ValueError: The count is another, or ``resize`` is smaller than ``image_size`` where it is used.
    """

    image_size: int
    resize: int | None = None
    count: int = 1

    def __post_init__(self) -> None:
        if self.count not in CROP_COUNTS:
            raise ValueError(f"evaluation_crops={self.count} must be 1, 10 or 144")
        if self.count != 144 and self.resize is not None and self.resize < self.image_size:
            raise ValueError(f"resize={self.resize} must be at least image_size={self.image_size}")

    def views(self, height: int, width: int) -> list[View]:
        """The crops of an image of a size: the mirrored ones in the second half, in the same order."""
        if self.count == 144:
            scales = [round(scale * self.image_size / 224) for scale in GOOGLENET_SCALES]
            views = [view for scale in scales for view in self._of_squares(scale, height, width)]
        else:
            scale = self.resize or (self.image_size if self.count == 1 else round(self.image_size * 256 / 224))
            top, left = square_places(*resized_shape(height, width, scale))[1]
            views = self._of_square(scale, top, left)
            views = [views[4]] if self.count == 1 else views
        return views if self.count == 1 else views + [view._replace(mirrored=True) for view in views]

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Cut the crops out of an image.

        Args:
            image: uint8, shape (H, W, channels).

        Returns:
            uint8, shape (count, image_size, image_size, channels).
        """
        size = self.image_size
        crops = np.empty((self.count, size, size, image.shape[2]), np.uint8)
        place = 0
        plain = self.views(*image.shape[:2])[: max(1, self.count // 2)]
        for scale, views in groupby(plain, key=lambda view: view.shorter_side):
            resized = resize_shorter_side(image, scale)
            for view in views:
                part = resized[view.top : view.top + view.side, view.left : view.left + view.side]
                crops[place] = resize(part, size, size)
                place += 1
        if self.count > 1:
            crops[place:] = crops[:place, :, ::-1]
        return crops

    def _of_squares(self, scale: int, height: int, width: int) -> list[View]:
        """The five crops of each of three squares, and the square itself."""
        views = []
        for top, left in square_places(*resized_shape(height, width, scale)):
            views += [*self._of_square(scale, top, left), View(scale, top, left, scale, False)]
        return views

    def _of_square(self, scale: int, top: int, left: int) -> list[View]:
        """The four corners and the centre of a square that begins at (top, left)."""
        size, end = self.image_size, scale - self.image_size
        places = [(0, 0), (0, end), (end, 0), (end, end), (end // 2, end // 2)]
        return [View(scale, top + down, left + right, size, False) for down, right in places]


def square_places(height: int, width: int) -> list[tuple[int, int]]:
    """Top and left of the first, the central and the last square along the longer side."""
    down, right = height - min(height, width), width - min(height, width)
    return [(0, 0), (down // 2, right // 2), (down, right)]
