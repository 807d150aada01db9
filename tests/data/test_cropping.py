"""GoogLeNet's crops: their distribution, their fallback, and their geometry when decoded at reduced scale."""

import cv2
import numpy as np
import pytest
from photos import ImagesInMemory, encode, noise, originals, smooth

from syncbn.data.transforms.augmentation import draw
from syncbn.data.transforms.cropping import ATTEMPTS, CropWindow, RandomCrop, cut_and_resize, reduction_for
from syncbn.random_streams import AUGMENTATION_STREAM, random_stream

DRAWS = 8000
KS_BOUND = 1.95 / DRAWS**0.5
"""Kolmogorov's distance that chance exceeds once in 1,000 times."""


def windows(crop: RandomCrop, height: int, width: int, count: int = DRAWS) -> np.ndarray:
    """Many crops of an image: (top, left, height, width) in columns."""
    found = []
    for index in range(count):
        draws = draw(random_stream(0, 0, index, AUGMENTATION_STREAM))
        found.append(crop.window(height, width, draws.crop_shapes, draws.crop_position))
    return np.array(found, dtype=np.float64)


def distance_from_uniform(values: np.ndarray, low: float, high: float) -> float:
    """Kolmogorov's distance between values and the uniform distribution."""
    place = np.clip((np.sort(values) - low) / (high - low), 0, 1)
    return float(np.abs(place - (np.arange(len(values)) + 0.5) / len(values)).max())


def test_area_and_aspect_where_every_crop_fits():
    found = windows(RandomCrop(0.08, 0.5), 4000, 4000)
    top, left, height, width = found.T
    assert distance_from_uniform(height * width / 4000**2, 0.08, 0.5) < KS_BOUND
    assert distance_from_uniform(np.log(width / height), -np.log(4 / 3), np.log(4 / 3)) < KS_BOUND
    assert distance_from_uniform(width / height, 3 / 4, 4 / 3) > 2 * KS_BOUND, "the check tells the two apart"
    assert distance_from_uniform(top / (4000 - height), 0, 1) < KS_BOUND
    assert distance_from_uniform(left / (4000 - width), 0, 1) < KS_BOUND
    assert abs(np.corrcoef(top / (4000 - height), left / (4000 - width))[0, 1]) < 4 / DRAWS**0.5


@pytest.mark.parametrize(("height", "width"), [(375, 500), (800, 500)])
def test_area_and_aspect_where_some_do_not_fit(height, width):
    """Against crops drawn another way: from all shapes at once, those that do not fit left out."""
    random = np.random.default_rng(1)
    area = random.uniform(0.08, 1.0, 400_000) * height * width
    aspect = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3), 400_000))
    fits = (np.sqrt(area / aspect) <= height + 0.5) & (np.sqrt(area * aspect) <= width + 0.5)
    found = windows(RandomCrop(), height, width)
    assert (found[:, :2] >= 0).all()
    assert (found[:, 0] + found[:, 2] <= height).all() and (found[:, 1] + found[:, 3] <= width).all()
    for values, expected in (
        (found[:, 2] * found[:, 3], area[fits]),
        (found[:, 3] / found[:, 2], aspect[fits]),
    ):
        # Rounding to pixels makes ties, which cost a little.
        below = np.searchsorted(np.sort(expected), np.sort(values)) / len(expected)
        assert np.abs(below - (np.arange(DRAWS) + 0.5) / DRAWS).max() < KS_BOUND + 0.01


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((100, 1000), CropWindow(0, 433, 100, 133)),
        ((1000, 100), CropWindow(433, 0, 133, 100)),
        ((100, 120), CropWindow(0, 0, 100, 120)),
    ],
)
def test_where_no_attempt_fits_the_centre_is_taken(shape, expected):
    tall = [[0.5, 0.0]] * ATTEMPTS  # the whole area at aspect 3/4 fits into none of these
    wide = [[0.5, 0.999]] * ATTEMPTS
    assert RandomCrop(1.0, 1.0).window(*shape, tall if shape[0] <= shape[1] else wide, (0.9, 0.9)) == expected


@pytest.mark.parametrize("shape", [(1, 1), (1, 500), (500, 1), (2, 3)])
def test_windows_of_tiny_images_lie_within(shape):
    for top, left, height, width in windows(RandomCrop(), *shape, count=200):
        assert height >= 1 and width >= 1 and top >= 0 and left >= 0
        assert top + height <= shape[0] and left + width <= shape[1]


@pytest.mark.parametrize(
    "option", [{"min_area": 0.0}, {"min_area": 0.6, "max_area": 0.5}, {"max_area": 1.1}, {"max_aspect": 0.75}], ids=str
)
def test_crops_out_of_range_are_refused(option):
    with pytest.raises(ValueError, match=f"crop.{next(iter(option))}={next(iter(option.values()))}"):
        RandomCrop(**option)


def test_reduction_leaves_enough_pixels():
    everything = (1, 2, 4, 8)
    assert reduction_for(CropWindow(0, 0, 447, 900), 224, everything) == 1
    assert reduction_for(CropWindow(0, 0, 448, 900), 224, everything) == 2
    assert reduction_for(CropWindow(0, 0, 900, 896), 224, everything) == 4
    assert reduction_for(CropWindow(0, 0, 9000, 9000), 224, everything) == 8
    assert reduction_for(CropWindow(0, 0, 9000, 9000), 224, (1,)) == 1


@pytest.mark.parametrize(
    "window", [CropWindow(13, 411, 259, 300), CropWindow(0, 0, 601, 903), CropWindow(301, 603, 300, 300)]
)
@pytest.mark.parametrize("size", [32, 64, 140])
def test_reduced_decoding_keeps_the_geometry(window, size):
    """On an image whose colours tell the place, to half a pixel of the result."""
    cropped = cut_and_resize(ImagesInMemory(encode(smooth(601, 903))).photo(), window, size)
    assert cropped.shape == (size, size, 3)
    centres = (np.arange(size) + 0.5) / size
    red = (window.left + centres * window.width) / 903 * 255
    green = (window.top + centres * window.height) / 601 * 255
    half_a_pixel = np.array([window.width / 903, window.height / 601]) / size / 2 * 255
    inner = slice(1, -1)
    assert np.abs(cropped[inner, inner, 0].mean(0) - red[inner]).max() < half_a_pixel[0] + 1
    assert np.abs(cropped[inner, inner, 1].mean(1) - green[inner]).max() < half_a_pixel[1] + 1


@pytest.mark.parametrize(("size", "bound"), [(64, 1.0), (112, 1.0)])
def test_reduced_decoding_gives_nearly_the_same_pixels(size, bound):
    """As decoding in full and averaging; on photos, in levels of 0..255 in the mean over an image."""
    photos = originals(20)
    reduced_ones = 0
    for index in range(len(photos)):
        photo = photos.photo(index)
        window = CropWindow(photo.height // 10, photo.width // 10, photo.height * 4 // 5, photo.width * 4 // 5)
        reduction = reduction_for(window, size, photo.reductions)
        reduced_ones += reduction > 1
        nearest = CropWindow(*(reduction * place for place in window.reduced(reduction)))
        full = nearest.cut(photo.pixels(1))
        expected = cv2.resize(
            full, (full.shape[1] // reduction, full.shape[0] // reduction), interpolation=cv2.INTER_AREA
        )
        expected = cv2.resize(expected, (size, size))
        assert np.abs(cut_and_resize(photo, window, size).astype(int) - expected).mean() < bound
    assert reduced_ones > 10


def test_the_result_depends_on_bytes_window_and_size_alone():
    content = encode(noise(300, 400))
    first, again = (cut_and_resize(ImagesInMemory(content).photo(), CropWindow(3, 5, 200, 220), 64) for _ in range(2))
    assert np.array_equal(first, again)


def test_strong_shrinking_without_a_jpeg_averages():
    image = noise(640, 640)
    cropped = cut_and_resize(ImagesInMemory(image).photo(), CropWindow(0, 0, 640, 640), 64)
    blocks = image.reshape(64, 10, 64, 10, 3).mean((1, 3))
    assert np.abs(cropped - blocks).max() <= 0.51
