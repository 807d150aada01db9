"""The order of the colours and the normalisation that each variant of the network is given."""

import numpy as np
import pytest
import torch
from photos import ImagesInMemory, noise

from syncbn.data import BatchedImages, ImageDataModule, SampleKey
from syncbn.models.variants import VARIANTS
from syncbn.preprocessing import PREPROCESSING

IMAGE = noise(16, 16)
RGB = IMAGE.astype(np.float64).transpose(2, 0, 1)


def column(*values: float) -> np.ndarray:
    return np.array(values)[:, None, None]


EXPECTED = {
    "paper": (RGB / 255 - column(0.485, 0.456, 0.406)) / column(0.229, 0.224, 0.225),
    "cadene": RGB[::-1] - column(104, 117, 128),
    "slim": 2 * RGB / 255 - 1,
}


def test_every_variant_has_its_preprocessing():
    assert set(PREPROCESSING) == set(VARIANTS) == set(EXPECTED)


@pytest.mark.parametrize("variant", EXPECTED)
def test_images_are_given_as_the_variant_wants_them(variant):
    batch = BatchedImages(ImagesInMemory(IMAGE), 16, preprocessing=variant)[SampleKey(0, 0)]
    assert batch.images.dtype == torch.float32 and batch.images.is_contiguous()
    assert np.abs(batch.images[0].numpy() - EXPECTED[variant]).max() < 1e-4


def test_grey_images_are_normalised_by_their_own_numbers():
    grey = ImagesInMemory(noise(16, 16, 1))
    batches = [BatchedImages(grey, 16, preprocessing=variant)[SampleKey(0, 0)] for variant in EXPECTED]
    assert torch.equal(batches[0].images, batches[1].images) and torch.equal(batches[0].images, batches[2].images)


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="preprocessing='vgg' must be one of paper, cadene, slim"):
        ImageDataModule(4, preprocessing="vgg")
