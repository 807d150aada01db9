"""From what the user names as data to data sets: the layout is detected."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from syncbn.data.datasets import idx, image_folder, parquet, shards
from syncbn.data.datasets.base import ImageDataset, OnReadError, Reading, Splits
from syncbn.data.datasets.fashion_mnist import fashion_mnist
from syncbn.data.datasets.selection import class_counts, hold_out

EMBEDDED = "fashion-mnist"
"""Name of the images that come with the package."""


class DataFormat(Protocol):
    """How one layout on the disk is told and opened: a module of `syncbn.data.datasets` each."""

    DESCRIPTION: str

    def matches(self, folder: Path) -> bool:
        """Whether ``folder`` holds data of this format."""
        ...

    def open_splits(self, folder: Path, reading: Reading) -> Splits:
        """Open its splits; ValueError where a part is missing or broken."""
        ...


FORMATS: tuple[DataFormat, ...] = (shards, idx, parquet, image_folder)
"""In the order in which they are asked."""

ACCEPTED = f"{EMBEDDED!r} (comes with the package), or a folder {', '.join(each.DESCRIPTION for each in FORMATS)}"

Stage = Literal["val", "test"]
"""What a figure of an evaluation is called by."""


@dataclass(frozen=True)
class ImageSets:
    """The sets of an experiment.

    Attributes:
        train: What is learned from.
        validation: What the best checkpoint is chosen by.
        test: What the result is reported on; None where there are no such images besides those of validation.
        validation_from: Where the validation images come from: "val", a set of their own; "train", held out of the
            training images; "test", they are the test images.
        test_from: Where the test images come from: "test", a set of their own; "val", the data's validation set, where
            other images are validated on; "train", held out of the training images; None where there are none.
        exif_orientation: Whether photos are turned as their EXIF says, or were as shards were made of them.
        remarks: What a user should know of the data, in words: what was left out and what is not used.
    """

    train: ImageDataset
    validation: ImageDataset
    test: ImageDataset | None
    validation_from: Literal["val", "train", "test"]
    test_from: Literal["test", "val", "train"] | None
    exif_orientation: bool = False
    remarks: tuple[str, ...] = ()

    def origin(self, stage: Stage) -> str:
        """Where the images of validation or test come from, in words; "" where they are a set of their own."""
        source = self.validation_from if stage == "val" else self.test_from
        if source == stage or source is None:
            return ""
        return {
            "train": "held out of the training images",
            "test": "the test images",
            "val": "the data's validation set, by which nothing is chosen",
        }[source]

    def describe(self) -> str:
        """How many images of how many classes there are, and the remarks, in words, one line."""
        validation, test = (f" ({origin})" if origin else "" for origin in (self.origin("val"), self.origin("test")))
        number = "no" if self.test is None else f"{len(self.test):,}"
        counts = (
            f"{len(self.train):,} training, {len(self.validation):,} validation{validation}, {number} test images{test}"
        )
        turned = f"EXIF orientation {'' if self.exif_orientation else 'not '}applied"
        photos = [turned] if self.train.channels == 3 else []
        return "; ".join([f"{len(self.train.classes):,} classes: {counts}", *photos, *self.remarks])


def open_image_sets(
    root: str,
    validation_images: int = 0,
    own_classes: bool = False,
    on_read_error: OnReadError = "stop",
    *,
    exif_orientation: bool | None = None,
    suffixes: Sequence[str] | None = None,
    validate_on_test: bool | None = False,
    test_images: int = 0,
) -> ImageSets:
    """Open the data that ``root`` names.

    Args:
        root: ``"fashion-mnist"``, or the path of a folder of shards, parquet files, idx files or class folders.
        validation_images: How many training images to hold out for validation. 0 holds out none; validation
            then takes the data's own validation set.
        own_classes: As of `Reading`.
        on_read_error: As of `Reading`.
        exif_orientation: As of `Reading`.
        suffixes: As of `Reading`.
        validate_on_test: Whether validation takes the test images, where none are held out; None if there are no
            others. Nothing is then to be chosen by it: a result on images by which it was chosen is none.
        test_images: How many training images to hold out for the test. 0 holds out none; the test then takes the
            data's own test set, or their validation set where others are held out for validation.

    Raises:
        ValueError: There is no such folder, its layout is unknown, a part of it is missing or broken, there is but one
            class, or there are no images to validate on.
    """
    for name, count in (("validation_images", validation_images), ("test_images", test_images)):
        if count < 0:
            raise ValueError(f"{name}={count} must not be negative")
    splits = _open_splits(root, Reading(own_classes, on_read_error, exif_orientation, suffixes))
    train, validation, test = (splits.of.get(split) for split in ("train", "val", "test"))
    assert train is not None
    if len(train.classes) < 2:
        raise ValueError(f"{root} holds one class, {train.classes[0]!r}: two or more are needed to tell apart")
    remarks = list(splits.remarks)
    source: Literal["val", "train", "test"] = "val"
    test_source: Literal["test", "val", "train"] | None = None if test is None else "test"
    if test_images:  # first, so that they are the same whatever is held out besides
        if test is not None:
            remarks.append(f"the {len(test):,} test images of their own are not used")
        (train, test), test_source = hold_out(train, test_images, "test_images"), "train"
    if validation_images:
        if validation is not None and test is not None:
            remarks.append(f"the {len(validation):,} validation images of their own are not used")
        elif validation is not None:  # nothing is chosen by it then: it is as good as a test set
            test, test_source = validation, "val"
        (train, validation), source = hold_out(train, validation_images), "train"
    elif validate_on_test or validation is None:
        if test is None or validate_on_test is False:
            raise ValueError(
                f"{root} has {_images_for(test, validate_on_test)}: {hold_some_out(train)}{_listed(remarks)}"
            )
        validation, source = test, "test"
    if lacking := [name for name, count in zip(train.classes, class_counts(train), strict=True) if not count]:
        remarks.append(f"no training image of {len(lacking)} classes, such as {lacking[0]!r}")
    return ImageSets(train, validation, test, source, test_source, splits.exif_orientation, tuple(remarks))


def _images_for(test: ImageDataset | None, validate_on_test: bool | None) -> str:
    """Which images to evaluate on are missing, in words."""
    if test is not None:
        return "training and test images, but none for validation, to choose the best checkpoint by"
    return "no test images" if validate_on_test else "training images, but neither val nor test to evaluate on"


def _listed(remarks: Sequence[str]) -> str:
    return f" ({'; '.join(remarks)})" if remarks else ""


def hold_some_out(train: ImageDataset) -> str:
    """The advice to hold out some training images, in words."""
    return (
        f"hold out some of the {len(train):,} training images, as by data.validation_images={max(1, len(train) // 20)}"
    )


def open_training_set(root: str, exif_orientation: bool | None = None) -> ImageDataset:
    """Open the training images alone of the data that ``root`` names; errors as in `open_image_sets`."""
    return _open_splits(root, Reading(exif_orientation=exif_orientation)).of["train"]


def _open_splits(root: str, reading: Reading) -> Splits:
    """The splits as they are on disk."""
    if root == EMBEDDED:
        return Splits({split: fashion_mnist(split) for split in ("train", "test")})
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise ValueError(f"no data at {root!r}: data.root takes {ACCEPTED}")
    for each in FORMATS:
        if each.matches(folder):
            return each.open_splits(folder, reading)
    raise ValueError(f"{str(folder)!r} holds no data of a known layout: data.root takes {ACCEPTED}")
