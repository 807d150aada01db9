"""Photometric distortion against the formulas, one step after the other, in float64."""

import itertools

import numpy as np
import pytest
from photos import noise, smooth

from syncbn.data import PhotometricDistortion
from syncbn.data.transforms.photometric import LIGHTING_AXES

GREY = np.array([0.299, 0.587, 0.114])
FACTORS = (0.9, 0.2, 0.75)
LIGHTING = np.array([0.8, -1.5, 0.3])


def step_by_step(image: np.ndarray, strengths: PhotometricDistortion, order: tuple[int, ...]) -> np.ndarray:
    """The definition: float64, shape (H, W, 3), neither rounded nor cut off."""
    pixels = image.astype(np.float64)
    brightness, contrast, saturation = (
        1 - strength + 2 * strength * factor
        for strength, factor in zip(
            (strengths.brightness, strengths.contrast, strengths.saturation), FACTORS, strict=True
        )
    )
    for step in order:
        if step == 0:
            pixels = brightness * pixels
        elif step == 1:
            pixels = contrast * pixels + (1 - contrast) * (pixels @ GREY).mean()
        else:
            pixels = saturation * pixels + (1 - saturation) * (pixels @ GREY)[:, :, None]
    colour = np.zeros(3)
    for axis in range(3):
        colour += strengths.lighting * LIGHTING[axis] * LIGHTING_AXES[:, axis] * 255
    return pixels + colour


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))), ids=str)
@pytest.mark.parametrize("image", [noise(40, 50), smooth(64, 48)], ids=["noise", "smooth"])
def test_colours_follow_the_formulas_in_any_order(order, image):
    strengths = PhotometricDistortion(0.4, 0.5, 0.3, 0.2)
    changed = strengths.colour_map(FACTORS, LIGHTING)(image)
    expected = step_by_step(image, strengths, order).clip(0, 255)
    assert changed.shape == image.shape and changed.dtype == np.uint8
    assert np.abs(changed - expected).max() <= 1.0
    assert np.abs(changed - expected).mean() < 0.4


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_each_strength_alone(name):
    image = noise(30, 30)
    strengths = PhotometricDistortion(**{"brightness": 0, "contrast": 0, "saturation": 0, "lighting": 0} | {name: 0.5})
    changed = strengths.colour_map(FACTORS, LIGHTING)(image)
    assert np.abs(changed - step_by_step(image, strengths, (2, 0, 1)).clip(0, 255)).max() <= 1.0
    assert np.abs(changed.astype(int) - image).mean() > 5


def test_without_strength_nothing_changes():
    image = noise(20, 20)
    assert np.array_equal(PhotometricDistortion(0, 0, 0, 0).colour_map(FACTORS, LIGHTING)(image), image)


def test_a_grey_image_is_the_grey_of_the_same_colour_image():
    grey = noise(30, 40, 1)
    colours = PhotometricDistortion(0.4, 0.5, 0.3, 0.2).colour_map(FACTORS, LIGHTING)
    expected = step_by_step(np.repeat(grey, 3, axis=2), PhotometricDistortion(0.4, 0.5, 0.3, 0.2), (1, 0, 2)) @ GREY
    changed = colours(grey)
    assert changed.shape == (30, 40, 1)
    assert np.abs(changed[:, :, 0] - expected.clip(0, 255)).max() <= 0.51


def test_lighting_has_the_variance_of_imagenets_colours():
    """Principal axes are orthogonal, and the noise's covariance is their outer product."""
    assert pytest.approx(np.diag([0.2175, 0.0188, 0.0045]) ** 2, abs=1e-4) == LIGHTING_AXES.T @ LIGHTING_AXES
    random = np.random.default_rng(0)
    strengths = PhotometricDistortion(0, 0, 0, 0.1)
    shifts = np.array([strengths.colour_map(FACTORS, random.standard_normal(3)).shift for _ in range(20_000)])
    expected = 25.5**2 * LIGHTING_AXES @ LIGHTING_AXES.T
    assert np.cov(shifts.T) == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("option", [{"brightness": 1.1}, {"contrast": -0.1}, {"lighting": -1.0}], ids=str)
def test_strengths_out_of_range_are_refused(option):
    with pytest.raises(ValueError, match=rf"photometric\.{next(iter(option))}="):
        PhotometricDistortion(**option)
