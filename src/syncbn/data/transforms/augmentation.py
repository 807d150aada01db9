"""From an image to what the network sees in training: randomly cropped or shifted, mirrored, recoloured.

Every random number is a function of (seed, epoch, index) alone, see `syncbn.random_streams`: the same image looks the
same in an epoch on any number of ranks.
"""

from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from syncbn.data.transforms.cropping import ATTEMPTS, CropWindow, RandomCrop, cut_and_resize, fit_square
from syncbn.data.transforms.photo import Photo
from syncbn.data.transforms.photometric import ColourMap, PhotometricDistortion


class Draws(NamedTuple):
    """All random numbers of one sample in one epoch.

    All are drawn whatever the strengths: changing one strength leaves the effect of the others alone.

    Attributes:
        shift: Down and right, uniform in [0, 1).
        mirror: Uniform in [0, 1).
        crop_shapes: Area and aspect of each attempted crop, uniform in [0, 1), shape (ATTEMPTS, 2).
        crop_position: Down and right, uniform in [0, 1).
        factors: Of brightness, contrast and saturation, uniform in [0, 1).
        lighting: Along the principal axes of the colours, standard normal, shape (3,).
    """

    shift: list[float]
    mirror: float
    crop_shapes: list[list[float]]
    crop_position: list[float]
    factors: list[float]
    lighting: np.ndarray


def draw(stream: np.random.Generator) -> Draws:
    """Take a sample's numbers from its `random_stream`."""
    return Draws(
        shift=stream.random(2).tolist(),
        mirror=stream.random(),
        crop_shapes=stream.random((ATTEMPTS, 2)).tolist(),
        crop_position=stream.random(2).tolist(),
        factors=stream.random(3).tolist(),
        lighting=stream.standard_normal(3),
    )


class ImagePlan(NamedTuple):
    """What is done to one image, apart from the resizing: it depends on the image's size, not on its pixels.

    Attributes:
        window: The crop, in pixels of the image; None takes the central square.
        mirrored: Whether left and right change places.
        colours: The photometric distortion; None for none.
    """

    window: CropWindow | None
    mirrored: bool
    colours: ColourMap | None


@dataclass(frozen=True)
class Augmentation:
    """Random changes to a training image.

    Args:
        max_shift: For small images: the image moves by up to this many pixels, up or down and left or right,
            each distance equally likely; what comes in at the border mirrors the image.
        mirror_probability: How often the image is mirrored left to right. 0 for digits and letters.
        crop: For photos: random crops. Null takes the central square.
        photometric: Random colours. Null leaves them.

    Raises:
        ValueError: An argument is out of range, or both ``max_shift`` and ``crop`` are given.
    """

    max_shift: int = 0
    mirror_probability: float = 0.5
    crop: RandomCrop | None = None
    photometric: PhotometricDistortion | None = None

    def __post_init__(self) -> None:
        if self.max_shift < 0:
            raise ValueError(f"augmentation.max_shift={self.max_shift} must not be negative")
        if self.max_shift and self.crop:
            raise ValueError(f"augmentation.max_shift={self.max_shift} is for images without a crop: leave it out")
        if not 0 <= self.mirror_probability <= 1:
            raise ValueError(f"augmentation.mirror_probability={self.mirror_probability} must lie in 0..1")

    def __call__(self, photo: Photo, size: int, stream: np.random.Generator) -> np.ndarray:
        """Crop, resize and change one image.

        Args:
            photo: Not decoded yet, or all there.
            size: Side of the result in pixels.
            stream: Where the random numbers come from.

        Returns:
            uint8, shape (size, size, channels): a function of the image, the size and the stream alone.
        """
        draws = draw(stream)
        plan = self.plan(photo.height, photo.width, draws)
        if plan.window is None:
            image = shift(fit_square(photo.pixels(), size), self.max_shift, draws.shift)
        else:
            image = cut_and_resize(photo, plan.window, size)
        if plan.mirrored:
            image = cv2.flip(image, 1).reshape(image.shape)
        return image if plan.colours is None else plan.colours(image)

    def plan(self, height: int, width: int, draws: Draws) -> ImagePlan:
        """What the random numbers mean for an image of a size."""
        window, colours = None, None
        if self.crop:
            window = self.crop.window(height, width, draws.crop_shapes, draws.crop_position)
        if self.photometric:
            colours = self.photometric.colour_map(draws.factors, draws.lighting)
        return ImagePlan(window, draws.mirror < self.mirror_probability, colours)


def shift(image: np.ndarray, max_shift: int, draws: list[float]) -> np.ndarray:
    """Move an image by up to ``max_shift`` pixels; what comes in at the border mirrors it.

    Args:
        image: uint8, shape (H, W, channels).
        max_shift: In pixels.
        draws: Down and right, in [0, 1).
    """
    if not max_shift:
        return image
    height, width = image.shape[:2]
    top, left = (int(number * (2 * max_shift + 1)) for number in draws)
    padded = np.pad(image, ((max_shift, max_shift), (max_shift, max_shift), (0, 0)), mode="symmetric")
    return padded[top : top + height, left : left + width]
