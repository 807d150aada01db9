"""DALI on the CPU: the same samples, crops, mirrors and colours as the OpenCV path; pixels that nearly agree."""

import importlib.util
import io

import numpy as np
import pytest
import torch
from photos import ImagesInMemory, encode, noise, originals, smooth
from PIL import Image

from syncbn.data import (
    Augmentation,
    BatchedImages,
    GlobalBatchSampler,
    PhotometricDistortion,
    RandomCrop,
    ShardLayout,
    WindowedOrder,
    WindowReader,
)
from syncbn.data.datasets.array import ArrayDataset
from syncbn.data.loading import dali
from syncbn.data.loading.dali import DaliLoader

EVERYTHING = Augmentation(crop=RandomCrop(), photometric=PhotometricDistortion())
needs_dali = pytest.mark.skipif(
    importlib.util.find_spec("nvidia") is None or importlib.util.find_spec("nvidia.dali") is None,
    reason="NVIDIA DALI is not installed: pip install 'syncbn[dali]'",
)


def both(photos: ImagesInMemory, size: int, augmentation: Augmentation, batch_size: int) -> tuple[list, list]:
    """The batches of DALI's loader and those of OpenCV, of epoch 1."""
    sampler = GlobalBatchSampler(len(photos), batch_size, seed=7)
    sampler.set_epoch(1)
    loader = DaliLoader(photos, sampler, size, augmentation, seed=7, preprocessing="cadene")
    expected = BatchedImages(photos, size, augmentation, seed=7, preprocessing="cadene")
    return list(loader), [expected.__getitems__(keys) for keys in sampler]


@needs_dali
@pytest.mark.parametrize("augmentation", [EVERYTHING, Augmentation(crop=RandomCrop())], ids=["colours", "plain"])
def test_the_same_batches_as_opencv(augmentation):
    photos = originals(40)
    actual, expected = both(photos, 224, augmentation, 8)
    assert len(actual) == len(expected) == 5
    for got, wanted in zip(actual, expected, strict=True):
        assert torch.equal(got.indices, wanted.indices) and torch.equal(got.labels, wanted.labels)
        assert got.images.shape == (8, 3, 224, 224) and got.images.dtype == torch.float32
        difference = (got.images - wanted.images).abs().mean((1, 2, 3))  # in levels of 0..255
        assert difference.max() < 12 and difference.mean() < 2.5


@needs_dali
def test_crops_and_mirrors_agree_on_an_image_whose_colours_tell_the_place():
    photos = ImagesInMemory(*(encode(smooth(180, 240)) for _ in range(12)))
    actual, expected = both(photos, 32, Augmentation(crop=RandomCrop()), 4)
    for got, wanted in zip(actual, expected, strict=True):
        assert (got.images - wanted.images)[:, :, 1:-1, 1:-1].abs().max() < 6  # a pixel aside is 8 at full area


@needs_dali
def test_leaving_early_and_starting_again():
    photos = ImagesInMemory(*(encode(noise(60, 60, seed=number)) for number in range(12)))
    sampler = GlobalBatchSampler(12, 2, seed=1)
    loader = DaliLoader(photos, sampler, 16, EVERYTHING, seed=1)
    first = next(iter(loader))
    again = list(loader)
    assert len(again) == len(loader) == 6 and torch.equal(first.images, again[0].images)
    sampler.set_position(0, 4)
    assert torch.equal(next(iter(loader)).images, again[4].images)


@needs_dali
def test_windows_of_shards_are_read_forwards(monkeypatch):
    photos = ImagesInMemory(*(encode(noise(20, 20, seed=number)) for number in range(24)))
    layout = ShardLayout(starts=np.arange(0, 25, 6), sizes=np.full(4, 1000))
    order = WindowedOrder(layout, 2, seed=1)
    sampler = GlobalBatchSampler(24, 4, order=order)
    loader = DaliLoader(photos, sampler, 16, EVERYTHING, seed=1, reader=WindowReader(photos, sampler, order))
    read: list[int] = []
    encoded = photos.encoded
    monkeypatch.setattr(photos, "encoded", lambda sample: read.append(sample) or encoded(sample))
    used = torch.cat([batch.indices for batch in loader]).tolist()
    assert used == [key.sample for keys in sampler for key in keys]
    assert read[:12] == sorted(used[:12]) != used[:12]
    assert sorted(read[:24]) == list(range(24)), "each once"


@needs_dali
@pytest.mark.parametrize("left_out", [{0}, {0, 1, 2}, {1, 3}, {0, 1, 2, 3}])
def test_what_is_left_out_may_leave_empty_batches(left_out):
    photos = ImagesInMemory(*(encode(noise(20, 20, seed=number)) for number in range(4)))
    sampler = GlobalBatchSampler(4, 1, seed=1, left_out=left_out)
    batches = list(DaliLoader(photos, sampler, 16, EVERYTHING, seed=1))
    assert [batch.indices.tolist() for batch in batches] == [[key.sample for key in keys] for keys in sampler]
    assert [len(batch.images) for batch in batches] == [len(batch.labels) for batch in batches]
    every = {
        int(batch.indices): batch.images for batch in DaliLoader(photos, GlobalBatchSampler(4, 1), 16, EVERYTHING, 1)
    }
    assert all(batch.images.equal(every[int(batch.indices)]) for batch in batches if len(batch.labels))


@needs_dali
def test_a_broken_file_is_named():
    whole = encode(noise(60, 60))
    broken = whole[: whole.index(b"\xff\xda")]  # a header, and no image
    sampler = GlobalBatchSampler(2, 2, seed=1)
    with pytest.raises(ValueError, match="cannot decode the image image number 1"):
        list(DaliLoader(ImagesInMemory(whole, broken), sampler, 16, EVERYTHING, seed=1))


@needs_dali
def test_files_that_only_opencv_decodes_are_the_same_pictures():
    grey = Image.fromarray(smooth(60, 60)).convert("L")
    files = [saved(grey, "GIF"), saved(grey, "TIFF"), saved(grey.convert("CMYK"), "JPEG"), saved(grey, "JPEG")]
    photos = ImagesInMemory(*files)
    actual, expected = both(photos, 32, Augmentation(crop=RandomCrop()), 4)
    assert (actual[0].images - expected[0].images)[:, :, 1:-1, 1:-1].abs().max() < 6


def saved(image: Image.Image, kind: str) -> bytes:
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()


@needs_dali
def test_a_file_that_dali_alone_cannot_decode_is_named(monkeypatch):
    whole = encode(noise(60, 60))
    monkeypatch.setattr(dali, "file_for_dali", lambda photo: photo.encoded)
    photos = ImagesInMemory(whole, saved(Image.fromarray(noise(60, 60)), "GIF"))
    sampler = GlobalBatchSampler(2, 2, seed=1)
    with pytest.raises(ValueError, match=r"cannot decode the image image number 1 .*take data\.decoder=opencv"):
        list(DaliLoader(photos, sampler, 16, EVERYTHING, seed=1))


def test_what_dali_is_not_for_is_refused():
    sampler = GlobalBatchSampler(1, 1)
    photos = ImagesInMemory(encode(noise(20, 20)))
    for augmentation in (None, Augmentation()):
        with pytest.raises(ValueError, match=r"needs data\.augmentation\.crop"):
            DaliLoader(photos, sampler, 16, augmentation, 0)
    arrays = ArrayDataset(np.zeros((1, 9, 9), np.uint8), np.zeros(1, int), ["a"], 0.5, 0.5)
    with pytest.raises(ValueError, match="colour images in files"):
        DaliLoader(arrays, sampler, 16, EVERYTHING, 0)


@pytest.mark.skipif(not needs_dali.args[0], reason="NVIDIA DALI is installed")
def test_without_dali_it_says_what_to_install():
    with pytest.raises(ValueError, match=r"pip install 'syncbn\[dali\]'"):
        DaliLoader(ImagesInMemory(encode(noise(20, 20))), GlobalBatchSampler(1, 1), 16, EVERYTHING, 0)
