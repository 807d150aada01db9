"""1, 10 and 144 crops against a direct implementation of their definitions."""

import cv2
import numpy as np
import pytest
import torch
from photos import ImagesInMemory, encode, noise, originals, smooth

from syncbn.data import BatchedImages, EvaluationCrops, ImageDataModule, SampleKey
from syncbn.data.transforms.cropping import fit_square


def resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    if image.shape[:2] == (height, width):
        return image
    shrinks = height * width < image.shape[0] * image.shape[1]
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
    return resized.reshape(height, width, image.shape[2])


def direct_144_crops(image: np.ndarray, size: int) -> list[np.ndarray]:
    """GoogLeNet's section 7 word by word, one crop at a time; mirror images last."""
    crops = []
    for scale in (256, 288, 320, 352):
        shorter = round(scale * size / 224)
        height, width = image.shape[:2]
        if height <= width:
            whole = resized(image, shorter, round(width * shorter / height))
            spare = whole.shape[1] - shorter
            squares = [whole[:, start : start + shorter] for start in (0, spare // 2, spare)]
        else:
            whole = resized(image, round(height * shorter / width), shorter)
            spare = whole.shape[0] - shorter
            squares = [whole[start : start + shorter] for start in (0, spare // 2, spare)]
        for square in squares:
            middle = (shorter - size) // 2
            crops.append(square[:size, :size])
            crops.append(square[:size, -size:])
            crops.append(square[-size:, :size])
            crops.append(square[-size:, -size:])
            crops.append(square[middle : middle + size, middle : middle + size])
            crops.append(resized(square, size, size))
    return crops + [crop[:, ::-1] for crop in crops]


@pytest.mark.parametrize("shape", [(300, 421, 3), (421, 300, 3), (256, 256, 3), (50, 61, 1)], ids=str)
@pytest.mark.parametrize("size", [224, 32])
def test_144_crops_of_any_image(shape, size):
    image = noise(*shape)
    crops = EvaluationCrops(size, count=144)(image)
    expected = direct_144_crops(image, size)
    assert crops.shape == (144, size, size, shape[2]) and len(expected) == 144
    for number in range(144):
        assert np.array_equal(crops[number], expected[number]), number


def test_144_crops_of_photos():
    photos = originals(6)
    for index in range(len(photos)):
        image = photos.photo(index).pixels()
        assert np.array_equal(EvaluationCrops(224, count=144)(image), np.stack(direct_144_crops(image, 224)))


def test_views_say_where_the_crops_lie():
    """On an image whose colours tell the place."""
    crops, image = EvaluationCrops(64, count=144), smooth(300, 400)
    views = crops.views(300, 400)
    assert len(views) == len(set(views)) == 144
    for view, crop in zip(views, crops(image), strict=True):
        pixel = 300 / view.shorter_side
        red = (view.left + view.side / 2) * pixel / 400 * 255
        green = (view.top + view.side / 2) * pixel / 300 * 255
        assert crop.reshape(-1, 3).mean(0)[:2] == pytest.approx((red, green), abs=1.5)
        assert (float(crop[0, -1, 0]) < float(crop[0, 0, 0])) == view.mirrored


def test_10_crops_are_those_of_the_central_square():
    image = noise(300, 421)
    crops = EvaluationCrops(224, 256, 10)(image)
    whole = resized(image, 256, round(421 * 256 / 300))
    start = (whole.shape[1] - 256) // 2
    square = whole[:, start : start + 256]
    expected = [square[:224, :224], square[:224, 32:], square[32:, :224], square[32:, 32:], square[16:240, 16:240]]
    assert np.array_equal(crops, np.stack(expected + [crop[:, ::-1] for crop in expected]))


def test_1_crop_is_the_centre():
    image = noise(300, 421)
    whole = resized(image, 256, round(421 * 256 / 300))
    left = (whole.shape[1] - 224) // 2
    assert np.array_equal(EvaluationCrops(224, 256)(image)[0], whole[16:240, left : left + 224])
    assert np.array_equal(EvaluationCrops(224)(image)[0], fit_square(image, 224))


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 500, 3), (500, 1, 1)], ids=str)
@pytest.mark.parametrize("count", [1, 10, 144])
def test_tiny_and_narrow_images(shape, count):
    crops = EvaluationCrops(32, None if count == 144 else 36, count)(np.full(shape, 9, np.uint8))
    assert crops.shape == (count, 32, 32, shape[2]) and (crops == 9).all()


def test_ten_crops_differ_without_a_resize():
    crops = EvaluationCrops(32, count=10)(smooth(64, 64))
    assert len({crop.tobytes() for crop in crops}) == 10


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"count": 12}, "crops=12"),
        ({"resize": 200}, "resize=200"),
    ],
    ids=str,
)
def test_what_is_out_of_range_is_refused(option, message):
    with pytest.raises(ValueError, match=message):
        EvaluationCrops(224, **option)


def test_the_four_scales_of_144_crops_take_the_place_of_resize():
    assert EvaluationCrops(224, 256, 144).views(300, 400) == EvaluationCrops(224, None, 144).views(300, 400)


def test_a_batch_holds_all_crops_of_each_image_and_decodes_in_full():
    contents = [encode(smooth(200, 300)), encode(noise(150, 120))]
    images = BatchedImages(ImagesInMemory(*contents), 32, crops=EvaluationCrops(32, 36, 10))
    batch = images.__getitems__([SampleKey(0, 1), SampleKey(0, 0)])
    assert batch.images.shape == (2, 10, 3, 32, 32) and batch.labels.tolist() == [1, 0]
    full = cv2.imdecode(np.frombuffer(contents[0], np.uint8), cv2.IMREAD_COLOR_RGB)
    expected = images.normalise(torch.from_numpy(EvaluationCrops(32, 36, 10)(full)))
    assert torch.equal(batch.images[1], expected)
    assert images.__getitems__([]).images.shape == (0, 10, 3, 32, 32)


@pytest.mark.parametrize(("crops", "images_at_a_time"), [(1, 200), (10, 20), (144, 1)])
def test_more_crops_take_no_more_memory(crops, images_at_a_time):
    data = ImageDataModule(global_batch_size=200, image_size=8, evaluation_crops=crops)
    for loader in (data.val_dataloader(), data.test_dataloader()):
        batch = next(iter(loader))
        assert batch.images.shape == (images_at_a_time, *([crops] if crops > 1 else []), 1, 8, 8)
        assert len(loader) == 2000 // images_at_a_time
