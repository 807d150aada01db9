"""Augmentation is a function of (seed, epoch, index); resizing keeps what it should."""

import cv2
import numpy as np
import pytest
import torch
from photos import ImagesInMemory, noise
from torch.utils.data import DataLoader

from syncbn.data import (
    Augmentation,
    BatchedImages,
    GlobalBatchSampler,
    PhotometricDistortion,
    RandomCrop,
    SampleKey,
    fashion_mnist,
)
from syncbn.data.datasets.selection import Selection
from syncbn.data.loading.batches import keep_batch
from syncbn.data.transforms.augmentation import draw
from syncbn.data.transforms.cropping import fit_square
from syncbn.random_streams import AUGMENTATION_STREAM, random_stream

STRONG = Augmentation(max_shift=4, mirror_probability=0.5)
EVERYTHING = Augmentation(crop=RandomCrop(), photometric=PhotometricDistortion())


def few_images() -> Selection:
    return Selection(fashion_mnist("train"), np.arange(24))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("augmentation", [STRONG, EVERYTHING], ids=["small", "photos"])
def test_a_sample_looks_the_same_on_any_rank_and_in_any_worker(num_workers, augmentation):
    expected = {}
    for num_ranks in (1, 2, 4):
        for rank in range(num_ranks):
            sampler = GlobalBatchSampler(24, 8, rank=rank, num_ranks=num_ranks, seed=5)
            sampler.set_epoch(2)
            images = BatchedImages(few_images(), 28, augmentation, seed=5)
            for batch in DataLoader(
                images,
                batch_sampler=sampler,
                collate_fn=keep_batch,
                num_workers=num_workers if rank == 0 else 0,
            ):
                for image, label, index in zip(batch.images, batch.labels, batch.indices, strict=True):
                    known = expected.setdefault(int(index), (image.clone(), int(label)))
                    assert torch.equal(image, known[0]) and int(label) == known[1]
    assert len(expected) == 24


def test_seed_epoch_and_index_each_make_a_difference():
    def appearance(seed: int, epoch: int, sample: int) -> bytes:
        images = BatchedImages(Selection(few_images(), np.zeros(24, int)), 28, STRONG, seed)
        return images.prepared_image(SampleKey(epoch, sample)).tobytes()

    assert len({appearance(0, 0, sample) for sample in range(24)}) > 12
    assert len({appearance(0, epoch, 0) for epoch in range(24)}) > 12
    assert len({appearance(seed, 0, 0) for seed in range(24)}) > 12


def test_shifts_and_mirror_cover_their_range():
    image = np.zeros((9, 9, 1), np.uint8)
    image[4, 3] = 255
    places = set()
    for index in range(600):
        stream = random_stream(0, 0, index, AUGMENTATION_STREAM)
        changed = Augmentation(1, 0.5)(ImagesInMemory(image).photo(), 9, stream)
        assert changed.shape == image.shape
        places.add(tuple(int(axis[0]) for axis in np.nonzero(changed[:, :, 0])))
    plain = {(4 - down, 3 - right) for down in (-1, 0, 1) for right in (-1, 0, 1)}
    assert places == plain | {(row, 8 - column) for row, column in plain}


def test_without_augmentation_the_image_is_the_image():
    off = Augmentation(max_shift=0, mirror_probability=0.0)
    plain, changed = (BatchedImages(few_images(), 28, augmentation) for augmentation in (None, off))
    keys = [SampleKey(1, sample) for sample in range(24)]
    assert torch.equal(plain.__getitems__(keys).images, changed.__getitems__(keys).images)


@pytest.mark.parametrize(("shift", "mirror"), [(-1, 0.5), (2, 1.5), (2, -0.1)])
def test_strengths_out_of_range_are_refused(shift, mirror):
    with pytest.raises(ValueError, match="augmentation"):
        Augmentation(shift, mirror)


def test_shifts_are_for_images_without_a_crop():
    with pytest.raises(ValueError, match="max_shift=2 is for images without a crop"):
        Augmentation(max_shift=2, crop=RandomCrop())


def test_equally_many_numbers_are_drawn_whatever_the_strengths():
    following = set()
    for augmentation in (Augmentation(0, 0.0), STRONG, EVERYTHING, Augmentation(crop=RandomCrop(0.9, 1.0))):
        stream = random_stream(3, 4, 5, AUGMENTATION_STREAM)
        augmentation(ImagesInMemory(noise(20, 30)).photo(), 16, stream)
        following.add(stream.random())
    assert len(following) == 1


def test_changing_one_strength_leaves_the_others_alone():
    weak = Augmentation(crop=RandomCrop(), photometric=PhotometricDistortion(0.2, 0.2, 0.2, 0.0))
    changed = Augmentation(0, 1.0, RandomCrop(), PhotometricDistortion(0.2, 0.2, 0.2, 0.3))
    for index in range(20):
        draws = draw(random_stream(0, 0, index, AUGMENTATION_STREAM))
        one, other = (augmentation.plan(300, 400, draws) for augmentation in (weak, changed))
        assert one.window == other.window and other.mirrored
        assert np.array_equal(one.colours.own, other.colours.own)
        assert np.array_equal(one.colours.mean, other.colours.mean)
        assert not one.colours.shift.any() and other.colours.shift.all()


def test_the_whole_is_crop_then_resize_then_mirror_then_colours():
    image = noise(60, 90)
    mirrored = set()
    for index in range(12):
        plan = EVERYTHING.plan(60, 90, draw(random_stream(0, 0, index, AUGMENTATION_STREAM)))
        window = plan.window.cut(image)
        interpolation = cv2.INTER_AREA if min(window.shape[:2]) >= 32 else cv2.INTER_LINEAR
        expected = cv2.resize(window, (16, 16), interpolation=interpolation)
        expected = plan.colours(np.ascontiguousarray(expected[:, ::-1] if plan.mirrored else expected))
        actual = EVERYTHING(ImagesInMemory(image).photo(), 16, random_stream(0, 0, index, AUGMENTATION_STREAM))
        assert np.array_equal(actual, expected)
        mirrored.add(plan.mirrored)
    assert mirrored == {False, True}


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 500, 3), (500, 1, 1), (3, 2, 1)])
def test_tiny_and_narrow_images(shape):
    for index in range(10):
        stream = random_stream(0, 0, index, AUGMENTATION_STREAM)
        changed = EVERYTHING(ImagesInMemory(np.full(shape, 9, np.uint8)).photo(), 32, stream)
        assert changed.shape == (32, 32, shape[2]) and changed.dtype == np.uint8


@pytest.mark.parametrize("shape", [(28, 28, 1), (10, 30, 3), (31, 9, 3), (7, 7, 1), (64, 65, 3)])
def test_fit_square(shape):
    image = np.full(shape, 77, np.uint8)
    fitted = fit_square(image, 28)
    assert fitted.shape == (28, 28, shape[2]) and (fitted == 77).all()


def test_batches_are_normalised_and_may_be_empty():
    images = BatchedImages(fashion_mnist("train"), 28)
    batch = images.__getitems__([SampleKey(0, sample) for sample in range(2000)])
    assert batch.images.shape == (2000, 1, 28, 28) and batch.images.dtype == torch.float32
    assert abs(float(batch.images.mean())) < 0.02 and abs(float(batch.images.std()) - 1) < 0.02
    assert batch.indices.tolist() == list(range(2000))
    empty = images.__getitems__([])
    assert empty.images.shape == (0, 1, 28, 28) and empty.labels.shape == (0,)
