"""GoogLeNet's random crops, and resizing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from syncbn.data.transforms.photo import Photo

ATTEMPTS = 10
"""Crops that are tried before the central one is taken."""


class CropWindow(NamedTuple):
    """A rectangle of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def cut(self, image: np.ndarray) -> np.ndarray:
        """The rectangle's pixels: a view."""
        return image[self.top : self.top + self.height, self.left : self.left + self.width]

    def reduced(self, factor: int) -> "CropWindow":
        """The nearest rectangle of the image shrunk by ``factor``: it differs by half a pixel of that at most."""
        top, left = round(self.top / factor), round(self.left / factor)
        bottom, right = round((self.top + self.height) / factor), round((self.left + self.width) / factor)
        return CropWindow(top, left, bottom - top, right - left)


@dataclass(frozen=True)
class RandomCrop:
    """GoogLeNet's training crops (Szegedy et al. 2015, section 6), stretched to a square.

    The share of the area is uniform, the logarithm of the aspect is uniform (GoogLeNet does not say): a crop is
    as often wide as it is tall. Where ten attempts do not fit into the image, the largest central crop of
    an allowed aspect is taken.

    Args:
        min_area: Smallest share of the image's area.
        max_area: Largest share of the image's area.
        max_aspect: Width by height lies in 1/max_aspect..max_aspect.

    Raises:
        ValueError: ``0 < min_area <= max_area <= 1`` or ``max_aspect >= 1`` does not hold.
    """

    min_area: float = 0.08
    max_area: float = 1.0
    max_aspect: float = 4 / 3

    def __post_init__(self) -> None:
        if not 0 < self.min_area <= self.max_area <= 1:
            raise ValueError(
                f"crop.min_area={self.min_area} and crop.max_area={self.max_area} must lie in 0..1, in this order"
            )
        if not 1 <= self.max_aspect < math.inf:
            raise ValueError(f"crop.max_aspect={self.max_aspect} must be at least 1: it is width by height")

    def window(
        self, height: int, width: int, shapes: Sequence[Sequence[float]], position: Sequence[float]
    ) -> CropWindow:
        """Choose a crop.

        Args:
            height: Of the image.
            width: Of the image.
            shapes: Random numbers in [0, 1): one for the area, one for the aspect, of each attempt.
            position: Random numbers in [0, 1): one down, one to the right.

        Returns:
            A window within the image.
        """
        for area_draw, aspect_draw in shapes:
            area = (self.min_area + (self.max_area - self.min_area) * area_draw) * height * width
            aspect = self.max_aspect ** (2 * aspect_draw - 1)
            crop_height, crop_width = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if 0 < crop_height <= height and 0 < crop_width <= width:
                top = int(position[0] * (height - crop_height + 1))
                left = int(position[1] * (width - crop_width + 1))
                return CropWindow(top, left, crop_height, crop_width)
        crop_height = min(height, round(width * self.max_aspect))
        crop_width = min(width, round(height * self.max_aspect))
        return CropWindow((height - crop_height) // 2, (width - crop_width) // 2, crop_height, crop_width)


def reduction_for(window: CropWindow, size: int, reductions: Sequence[int]) -> int:
    """The largest of the ``reductions`` at which the window still has ``size`` pixels each way."""
    shorter = min(window.height, window.width)
    return max(factor for factor in reductions if factor == 1 or shorter // factor >= size)


def cut_and_resize(photo: Photo, window: CropWindow, size: int) -> np.ndarray:
    """A window of a photo as a square, decoded at no larger scale than needed.

    Args:
        photo: The whole image.
        window: In pixels of the whole image.
        size: Side of the result in pixels.

    Returns:
        uint8, shape (size, size, channels).
    """
    reduction = reduction_for(window, size, photo.reductions)
    image = window.reduced(reduction).cut(photo.pixels(reduction))
    # A reduced JPEG shrinks by less than two here, where averaging is slow and of little use.
    interpolation = cv2.INTER_AREA if min(image.shape[:2]) >= 2 * size else cv2.INTER_LINEAR
    return resize(image, size, size, interpolation)


def resize(image: np.ndarray, height: int, width: int, interpolation: int | None = None) -> np.ndarray:
    """Resize an image.

    Args:
        image: uint8, shape (H, W, channels).
        height: Of the result.
        width: Of the result.
        interpolation: OpenCV's; None averages when it shrinks and interpolates linearly when it enlarges.

    Returns:
        uint8, shape (height, width, channels).
    """
    if image.shape[:2] == (height, width):
        return image
    if interpolation is None:
        shrinks = height * width < image.shape[0] * image.shape[1]
        interpolation = cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR
    return cv2.resize(image, (width, height), interpolation=interpolation).reshape(height, width, image.shape[2])


def resized_shape(height: int, width: int, shorter_side: int) -> tuple[int, int]:
    """Height and width of an image whose shorter side is resized: the aspect is kept, to a pixel."""
    shorter = min(height, width)
    return (
        max(shorter_side, round(height * shorter_side / shorter)),
        max(shorter_side, round(width * shorter_side / shorter)),
    )


def resize_shorter_side(image: np.ndarray, shorter_side: int) -> np.ndarray:
    """Resize an image, uint8 of shape (H, W, channels), to its `resized_shape`."""
    return resize(image, *resized_shape(image.shape[0], image.shape[1], shorter_side))


def fit_square(image: np.ndarray, size: int) -> np.ndarray:
    """Resize the shorter side to ``size`` and keep the central square.

    Args:
        image: uint8, shape (H, W, channels).
        size: Side of the result in pixels.

    Returns:
        uint8, shape (size, size, channels).
    """
    image = resize_shorter_side(image, size)
    top, left = (image.shape[0] - size) // 2, (image.shape[1] - size) // 2
    return image[top : top + size, left : left + size]
