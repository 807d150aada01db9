"""Which folders are the training, validation and test images."""

from pathlib import Path

import pytest
from photos import encode, noise

from syncbn.data import open_image_sets
from syncbn.data.datasets.image_folder import images_and_others
from syncbn.data.datasets.splits import find_splits, split_of

PICTURE = encode(noise(8, 8), ".png")


def fill(folder: Path, *names: str) -> None:
    """One image of each name, which may have folders."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PICTURE)


def with_classes(*splits: str) -> list[str]:
    return [f"{split}/{name}/1.png" for split in splits for name in ("cat", "dog")]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("TRAIN", "train"),
        ("training_set", "train"),
        ("Train Set", "train"),
        ("valid", "val"),
        ("Validation", "val"),
        ("val-set", "val"),
        ("dev", "val"),
        ("Testing", "test"),
        ("test_set", "test"),
        ("train2", None),
        ("set", None),
        ("tested", None),
    ],
)
def test_the_split_that_a_name_stands_for(name, split):
    assert split_of(name) == split


@pytest.mark.parametrize(
    ("splits", "validation"),
    [
        (("train", "valid", "test"), "valid"),
        (("train", "validation", "test"), "validation"),
        (("Train", "Val"), "Val"),
    ],
)
def test_usual_names_are_taken(tmp_path, splits, validation):
    fill(tmp_path, *with_classes(*splits, "extra"))
    sets = open_image_sets(str(tmp_path))
    assert sets.train.classes == ("cat", "dog") and (sets.test is not None) == (len(splits) == 3)
    assert sets.validation.name(0).startswith(str(tmp_path / validation)) and sets.validation_from == "val"
    assert sets.remarks == ("not used: extra",) and "not used: extra" in sets.describe()


def test_validation_images_are_asked_for_where_only_test_images_are_apart(tmp_path):
    fill(tmp_path, *with_classes("training_set", "test_set"))
    with pytest.raises(ValueError, match=r"none for validation, to choose .*validation_images=1"):
        open_image_sets(str(tmp_path))
    sets = open_image_sets(str(tmp_path), validation_images=1)
    assert (len(sets.train), len(sets.validation), len(sets.test)) == (1, 1, 2)
    sets = open_image_sets(str(tmp_path), validate_on_test=True)
    assert sets.validation_from == "test" and "2 validation (the test images)" in sets.describe()


def test_test_images_without_labels_are_named_as_unused(tmp_path):
    fill(tmp_path, *with_classes("train", "val"), "test/1.png")
    assert find_splits(tmp_path).unused == (tmp_path / "test",)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (with_classes("train", "Training"), "two folders of train images, Training and train"),
        (with_classes("photos/train", "photos/val"), r"is a folder too high: name data\.root=.*/photos"),
        (["cat/1.png"], "holds one class, cat: two or more are needed"),
        (
            ["photos/cat/1.png", "photos/dog/1.png"],
            r"one class, photos: .*name data\.root=.*photos if cat is one",
        ),
        (with_classes("val", "test"), "has test, val, but no training images"),
        (["train/1.png"], "train holds no class folders"),
        (with_classes("train/train", "train/val"), "are called train, val, as splits and not as classes"),
    ],
)
def test_what_cannot_be_told_is_refused(tmp_path, names, message):
    fill(tmp_path, *names)
    with pytest.raises(ValueError, match=message):
        open_image_sets(str(tmp_path), validation_images=1)


def test_the_training_folder_itself_names_what_lies_beside_it(tmp_path):
    fill(tmp_path, *with_classes("train", "val"), "train/cat/2.png", "train/dog/2.png")
    sets = open_image_sets(str(tmp_path / "train"), validation_images=1)
    assert sets.remarks == ("not used: ../val",)


def test_what_systems_leave_behind_is_neither_class_nor_image(tmp_path):
    fill(tmp_path, *with_classes("train", "val", "__MACOSX", ".hidden"))
    fill(tmp_path / "train", "__MACOSX/cat/1.png", "cat/@eaDir/2.png", "cat/.3.png", "cat/Thumbs.db", "cat/a.heic")
    fill(tmp_path / "train", "$RECYCLE.BIN/1.png", "lost+found/1.png", "cat/b.HEIC", "cat/notes")
    sets = open_image_sets(str(tmp_path))
    assert sets.train.classes == ("cat", "dog") and len(sets.train) == 2
    assert sets.remarks == ("2 .heic, 1 without suffix left out",)
    assert images_and_others(tmp_path / "train" / "cat")[0] == ["1.png"]


def test_the_files_that_are_images_can_be_named(tmp_path):
    fill(tmp_path, *with_classes("train", "val"), "train/cat/2.tif", "train/dog/3.JFIF")
    assert len(open_image_sets(str(tmp_path)).train) == 4
    sets = open_image_sets(str(tmp_path), suffixes=["png", ".TIF"])
    assert len(sets.train) == 3 and sets.remarks == ("1 .jfif left out",)
    with pytest.raises(ValueError, match=r"suffixes=\[\] takes no file"):
        open_image_sets(str(tmp_path), suffixes=[])
    with pytest.raises(ValueError, match=r"the class cat has no image: .* holds 1 \.png, 1 \.tif; convert them"):
        open_image_sets(str(tmp_path), suffixes=[".jfif"])
