"""From a decoded image to what the network sees: resized, and in training randomly changed.

Every random number is a function of (seed, epoch, index) alone, never of the rank, the worker or the order
of calls: the same image looks the same in an epoch on any number of ranks. The generator is Philox, which
is made for this (J. Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the seed and
the epoch are its key, the index is a part of its counter, and so no two streams overlap.
"""

from dataclasses import dataclass

import cv2
import numpy as np

ORDER_STREAM, AUGMENTATION_STREAM = 0, 1
"""The highest word of Philox's counter tells what the random numbers are for."""


def random_stream(seed: int, epoch: int, index: int, purpose: int) -> np.random.Generator:
    """The random numbers of one sample in one epoch.

    Args:
        seed: Of the run, in 0..2**64 - 1.
        epoch: Number of the epoch, from 0.
        index: Number of the sample in its data set, from 0.
        purpose: `ORDER_STREAM` or `AUGMENTATION_STREAM`.

    Returns:
        A generator that depends on the four arguments and on nothing else.
    """
    key = np.array([seed, epoch], dtype=np.uint64)
    counter = np.array([0, 0, index, purpose], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


@dataclass(frozen=True)
class Augmentation:
    """Random changes to a training image.

    Args:
        max_shift: The image moves by up to this many pixels, up or down and left or right, each distance
            equally likely; what comes in at the border mirrors the image.
        mirror_probability: How often the image is mirrored left to right. 0 for digits and letters.

    Raises:
        ValueError: ``max_shift`` is negative, or ``mirror_probability`` lies outside 0..1.
    """

    max_shift: int = 2
    mirror_probability: float = 0.5

    def __post_init__(self) -> None:
        if self.max_shift < 0:
            raise ValueError(f"augmentation.max_shift={self.max_shift} must not be negative")
        if not 0 <= self.mirror_probability <= 1:
            raise ValueError(f"augmentation.mirror_probability={self.mirror_probability} must lie in 0..1")

    def __call__(self, image: np.ndarray, stream: np.random.Generator) -> np.ndarray:
        """Change one image.

        Args:
            image: uint8, shape (H, W, channels).
            stream: Where the random numbers come from.

        Returns:
            The changed image, of the same shape.
        """
        # All numbers are drawn, whatever the strengths: changing one strength leaves the other draws alone.
        down, right = stream.integers(-self.max_shift, self.max_shift, size=2, endpoint=True)
        mirrored = stream.random() < self.mirror_probability
        if self.max_shift:
            height, width = image.shape[:2]
            margin = self.max_shift
            padded = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode="symmetric")
            image = padded[margin + down :, margin + right :][:height, :width]
        return image[:, ::-1] if mirrored else image


def fit_square(image: np.ndarray, size: int) -> np.ndarray:
    """Resize the shorter side to ``size`` and keep the central square.

    Args:
        image: uint8, shape (H, W, channels).
        size: Side of the result in pixels.

    Returns:
        uint8, shape (size, size, channels).
    """
    height, width, channels = image.shape
    if (height, width) == (size, size):
        return image
    shorter = min(height, width)
    target = (max(size, round(width * size / shorter)), max(size, round(height * size / shorter)))
    interpolation = cv2.INTER_AREA if shorter > size else cv2.INTER_LINEAR
    image = cv2.resize(image, target, interpolation=interpolation).reshape(target[1], target[0], channels)
    top, left = (target[1] - size) // 2, (target[0] - size) // 2
    return image[top : top + size, left : left + size]
