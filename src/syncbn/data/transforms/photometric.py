"""Photometric distortion: random brightness, contrast, saturation and lighting.

Each step is an affine map of the colours, and so is their chain, which is applied at once: one pass,
one rounding, and no highlight lost between a step that brightens and one that darkens. Where nothing is cut off
in between, brightness, contrast and saturation commute: the random order of A. Howard's steps makes no difference.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

LUMINANCE = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in the grey of a colour (ITU-R BT.601)."""

LIGHTING_AXES = np.array(
    [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
) * np.array([0.2175, 0.0188, 0.0045])
"""Principal axes of ImageNet's RGB colours (columns), each as long as its eigenvalue, on the scale 0..1
(Krizhevsky et al. 2012, section 4.1; numbers of fb.resnet.torch)."""

GREY = np.tile(LUMINANCE, (3, 1))
"""Maps a colour to its grey."""


class ColourMap(NamedTuple):
    """``own @ colour + mean @ (mean colour of the image) + shift``, of RGB on the scale 0..255.

    Attributes:
        own: float64, shape (3, 3).
        mean: float64, shape (3, 3).
        shift: float64, shape (3,).
    """

    own: np.ndarray
    mean: np.ndarray
    shift: np.ndarray

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Map an image's colours; a grey image is taken as a colour image of equal channels, and made grey again.

        Args:
            image: uint8, shape (H, W, 3) or (H, W, 1).

        Returns:
            uint8 of the same shape, rounded (to 1 level in all) and cut off at 0 and 255.
        """
        if image.shape[2] == 1:
            shift = LUMINANCE @ (self.mean.sum(1) * cv2.mean(image)[0] + self.shift)
            levels = np.arange(256) * (LUMINANCE @ self.own.sum(1)) + shift
            return cv2.LUT(image, np.rint(levels).clip(0, 255).astype(np.uint8)).reshape(image.shape)
        shift = self.mean @ cv2.mean(image)[:3] + self.shift
        return cv2.transform(image, np.column_stack([self.own, shift]))


@dataclass(frozen=True)
class PhotometricDistortion:
    """A. Howard's distortions (arXiv 1312.5402, section 2), to which the paper's sources refer.

    Brightness, contrast and saturation are each scaled by a factor uniform in 1 - strength..1 + strength: about
    black, about the image's mean grey, and about each pixel's own grey. Then comes Krizhevsky's lighting noise,
    one colour added to the whole image.

    The defaults are Howard's, for Inception and BN-Baseline. How far the BN-x models "reduce the photometric
    distortions" (section 4.2.1) the paper does not say.

    Args:
        brightness: Strength, in 0..1.
        contrast: Strength, in 0..1.
        saturation: Strength, in 0..1.
        lighting: Standard deviation of the noise, in multiples of the eigenvalues of ImageNet's colours.

    Raises:
        ValueError: A strength is out of range.
    """

    brightness: float = 0.5
    contrast: float = 0.5
    saturation: float = 0.5
    lighting: float = 0.1

    def __post_init__(self) -> None:
        for name in ("brightness", "contrast", "saturation"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"photometric.{name}={getattr(self, name)} must lie in 0..1")
        if not self.lighting >= 0:
            raise ValueError(f"photometric.lighting={self.lighting} must not be negative")

    def colour_map(self, factors: Sequence[float], lighting: np.ndarray) -> ColourMap:
        """The distortion that random numbers stand for.

        Args:
            factors: For brightness, contrast and saturation, in [0, 1).
            lighting: Normally distributed, for each principal axis, shape (3,).
        """
        strengths = (self.brightness, self.contrast, self.saturation)
        brightness, contrast, saturation = (
            1 + strength * (2 * factor - 1) for strength, factor in zip(strengths, factors, strict=True)
        )
        return ColourMap(
            own=brightness * contrast * (saturation * np.eye(3) + (1 - saturation) * GREY),
            mean=brightness * (1 - contrast) * GREY,
            shift=255 * LIGHTING_AXES @ (self.lighting * lighting),
        )
