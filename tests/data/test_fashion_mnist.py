"""The images that come with the package."""

import hashlib
from importlib.resources import files

import numpy as np
import pytest

from syncbn.data.datasets.fashion_mnist import ASSET, ASSET_SHA256, MEAN, STD, fashion_mnist

ASSETS = files("syncbn.data") / "assets"


def test_the_file_is_the_recorded_one_small_and_has_its_licence_beside_it():
    content = (ASSETS / ASSET).read_bytes()
    assert len(content) < 6_000_000
    assert hashlib.sha256(content).hexdigest() == ASSET_SHA256
    licence = (ASSETS / "LICENSE-fashion-mnist.txt").read_text()
    assert "The MIT License" in licence and "Zalando" in licence


@pytest.mark.parametrize(("split", "per_class"), [("train", 1000), ("test", 200)])
def test_classes_are_balanced_and_images_are_small_squares(split, per_class):
    images = fashion_mnist(split)
    assert np.bincount(images.labels).tolist() == [per_class] * 10
    assert images.images.shape == (10 * per_class, 28, 28) and images.images.dtype == np.uint8
    assert len(images.classes) == 10 and images.channels == 1
    assert images.image(3).shape == (28, 28, 1)


def test_no_image_is_in_both_splits():
    seen = {image.tobytes() for image in fashion_mnist("train").images}
    assert not any(image.tobytes() in seen for image in fashion_mnist("test").images)


def test_mean_and_std_are_those_of_the_training_images():
    pixels = fashion_mnist("train").images / 255
    assert (round(float(pixels.mean()), 5), round(float(pixels.std()), 5)) == (MEAN, STD)
