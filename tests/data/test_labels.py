"""Labels follow the names of the classes of a checkpoint, whatever the layout of the data."""

import cv2
import numpy as np
import pytest

from syncbn.data import ImageDataModule
from syncbn.data.datasets.array import ArrayDataset
from syncbn.data.datasets.formats import ImageSets
from syncbn.data.datasets.selection import Selection, class_counts, labels_of
from syncbn.data.labels import by_position, match_classes, relabel_sets

FRUIT = ("apple", "banana", "cherry")
NUMBERS = ("0", "1", "2")


@pytest.mark.parametrize(
    ("names", "trained", "labels", "remark"),
    [
        (("b", "a", "c"), ("a", "b", "c"), [1, 0, 2], "2 of 3 classes have another number in the checkpoint"),
        (("b", "d"), ("a", "b", "c", "d"), [1, 3], "2 of the 4 classes of the checkpoint have no image"),
        (("1", "0", "10"), ("0", "1", "10"), [1, 0, 2], "2 of 3"),
    ],
)
def test_the_same_names_are_found(names, trained, labels, remark):
    match = match_classes(names, trained, whole=False)
    assert match.labels.tolist() == labels and remark in match.remark


def test_the_same_names_in_the_same_order_need_no_match():
    assert match_classes(["a", "a"], ("a", "a"), whole=True) is None


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    ("names", "trained", "first"),
    [
        (
            ("aprikose", "banane", "zapfen"),
            FRUIT,
            r"'aprikose' of the data \(3 classes\) .* checkpoint \(3\), nor 'apple' of",
        ),
        (("apple", "banana", "cherry", "date"), FRUIT, r"'date' of the data \(4 classes\) .* of the checkpoint \(3\)"),
        (NUMBERS, FRUIT, "'0' of the data"),
        (FRUIT, NUMBERS, "'apple' of the data"),
        (("a", "b", "b"), ("b", "b", "a"), "the data has several classes called 'b'"),
    ],
)
def test_other_names_are_refused_by_the_first_that_differs(names, trained, first, whole):
    with pytest.raises(ValueError, match=f"{first}.*data.classes_by_name=false"):
        match_classes(names, trained, whole=whole)


def test_training_goes_on_with_all_classes():
    with pytest.raises(ValueError, match=r"'cherry' of the checkpoint \(3 classes\) is no class of the data \(2\)"):
        match_classes(FRUIT[:2], FRUIT, whole=True)


@pytest.mark.parametrize(("names", "trained"), [(NUMBERS, FRUIT), (FRUIT, NUMBERS), (NUMBERS[:2], FRUIT)])
def test_files_that_hold_numbers_are_matched_by_place(names, trained):
    match = match_classes(names, trained, whole=False, numbered=True)
    assert match.labels.tolist() == [0, 1, 2][: len(names)] and "classes without names" in match.remark
    assert ("1 of the 3 classes of the checkpoint have no image" in match.remark) == (len(names) == 2)
    if len(names) == 2:
        with pytest.raises(ValueError, match="'0' of the data"):
            match_classes(names, trained, whole=True, numbered=True)


def test_what_is_said_of_classes_by_position():
    assert by_position(FRUIT, FRUIT) == ""
    assert "1 of 3 classes have another name in the checkpoint ('banana' here, 'kiwi' there)" in by_position(
        FRUIT, ("apple", "kiwi", "cherry")
    )


def test_sets_are_relabelled_but_for_those_of_other_classes():
    labels = np.array([0, 1, 2, 1])
    images = ArrayDataset(np.arange(4, dtype=np.uint8).reshape(4, 1, 1), labels, FRUIT, 0.5, 0.5)
    other = ArrayDataset(images.images, labels, ("x", "y", "z"), 0.5, 0.5)
    sets = ImageSets(Selection(images, np.array([1, 2, 3])), Selection(images, np.array([0])), other, "train", "test")
    new = relabel_sets(sets, ("cherry", "date", "apple", "banana"), np.array([2, 3, 0]))
    assert labels_of(new.train).tolist() == [new.train.label(index) for index in range(3)] == [3, 0, 3]
    assert new.validation.label(0) == 2 and class_counts(new.train) == [1, 0, 0, 2]
    assert new.train.classes == new.validation.classes == ("cherry", "date", "apple", "banana")
    assert new.test is other
    assert [new.train.image(index).item() for index in range(3)] == [1, 2, 3]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for split in ("train", "val"):
        for number, name in enumerate(FRUIT):
            (folder / split / name).mkdir(parents=True)
            for place in range(number + 1):
                cv2.imwrite(str(folder / split / name / f"{place}.png"), np.full((8, 8, 3), 99 * number, np.uint8))
    return str(folder)


def of_batches(loader):
    return [
        (label, round(image.mean().item(), 5))
        for batch in loader
        for label, image in zip(batch.labels.tolist(), batch.images, strict=True)
    ]


def test_batches_hold_the_same_images_under_other_labels(photos):
    options = {"root": photos, "image_size": 8, "augmentation": None, "drop_last": False}
    plain = ImageDataModule(2, **options)
    data = ImageDataModule(2, checkpoint_classes=["banana", "cherry", "date", "apple"], **options)
    assert (data.num_classes, plain.num_classes, data.class_counts()) == (4, 3, [2, 3, 0, 1])
    new = {0: 3, 1: 0, 2: 1}
    for loader in ("train_dataloader", "val_dataloader", "test_dataloader"):
        expected = [(new[label], mean) for label, mean in of_batches(getattr(plain, loader)())]
        assert of_batches(getattr(data, loader)()) == expected and len(expected) == 6
    by_place = ImageDataModule(2, checkpoint_classes=["x", "y", "z"], classes_by_name=False, **options)
    assert by_place.classes == FRUIT and "'apple' here, 'x' there" in by_place.remark_on_classes


def test_fashion_mnist_and_numbers_are_the_same_classes():
    data = ImageDataModule(8, checkpoint_classes=[str(label) for label in range(10)])
    assert data.classes == tuple("0123456789") and data.class_counts() == [1000] * 10
