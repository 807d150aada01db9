"""From what the user names as data to data sets: the layout is detected."""

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from lightning_utilities.core.rank_zero import rank_zero_only

from syncbn.data.batches import OnReadError
from syncbn.data.datasets import ArrayDataset, ImageDataset, class_counts, hold_out
from syncbn.data.decoding import SUFFIXES
from syncbn.data.fashion_mnist import fashion_mnist
from syncbn.data.idx import IDX_FILES, find_idx_file, find_idx_folder, read_idx
from syncbn.data.image_folder import ImageFolderDataset, class_names, in_words, is_imagenet
from syncbn.data.parquet import ParquetDataset, find_parquet_files, is_unlabelled, unused_parquet_files
from syncbn.data.shard_dataset import ShardDataset
from syncbn.data.shards import INDEX_NAME, damaged_shards, read_index
from syncbn.data.splits import find_splits, visible_folders

EMBEDDED = "fashion-mnist"
"""Name of the images that come with the package."""

ACCEPTED = (
    f"{EMBEDDED!r} (comes with the package), a folder of shards (index.json, from `syncbn prepare`),"
    " of Hugging Face's parquet files (train-*.parquet ...), of MNIST idx files (train-images-idx3-ubyte[.gz] ...),"
    " with train/<class>/ and val/<class>/ of images, or with <class>/ alone"
)

Stage = Literal["val", "test"]
"""What a figure of an evaluation is called by."""

NAMED = 5
"""Of the files and folders that are not used, at most."""


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


@dataclass(frozen=True)
class Splits:
    """What is on disk.

    Attributes:
        of: "train", and those of "val" and "test" that there are.
        exif_orientation: As of `ImageSets`.
        remarks: As of `ImageSets`.
    """

    of: dict[str, ImageDataset]
    exif_orientation: bool = False
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """How data are read.

    Attributes:
        own_classes: Whether validation and test images may be of other classes than the training images, and their
            labels count their own.
        on_read_error: Whether shards that are missing or of another size are an error ("stop") or a warning
            ("skip").
        exif_orientation: Whether photos are turned as their EXIF says. None turns those of folders and tables, but
            not those of ImageNet, known by the names of its classes; shards are as they were made.
        suffixes: Endings of the names of the files that are images; None takes all that can be read.
    """

    own_classes: bool = False
    on_read_error: OnReadError = "stop"
    exif_orientation: bool | None = None
    suffixes: Sequence[str] | None = None

    @property
    def endings(self) -> tuple[str, ...]:
        """The suffixes in small letters, each with its dot."""
        if self.suffixes is None:
            return SUFFIXES
        if not self.suffixes:
            raise ValueError("suffixes=[] takes no file: leave it out, or name some, as ['.jpg', '.png']")
        return tuple("." + suffix.lower().lstrip(".") for suffix in self.suffixes)

    def turns(self, classes: Sequence[str]) -> bool:
        """Whether photos of such classes are turned as their EXIF says."""
        return not is_imagenet(classes) if self.exif_orientation is None else self.exif_orientation


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
    if (folder / INDEX_NAME).is_file():
        return _open_shards(folder, reading)
    if idx_folder := find_idx_folder(folder):
        return Splits(_open_idx_folder(idx_folder))
    if find_parquet_files(folder, "train"):
        return _open_parquet_files(folder, reading)
    return _open_image_folder(folder, reading)


def _open_shards(folder: Path, reading: Reading) -> Splits:
    index = read_index(folder)
    damaged = damaged_shards(index)
    if damaged and reading.on_read_error == "stop":
        raise ValueError(
            f"{damaged[0]} ({len(damaged)} such shards): prepare the data again, or leave out what is lost by"
            " data.on_read_error=skip"
        )
    for line in damaged if getattr(rank_zero_only, "rank", 0) == 0 else ():  # without Lightning there is no rank
        warnings.warn(f"{line}: its images are left out", stacklevel=2)
    if "train" not in index.splits or not index.splits["train"].samples:
        raise ValueError(f"{folder} holds shards, but none of training images: prepare the data again")
    if reading.exif_orientation not in (None, index.exif_orientation):
        raise ValueError(
            f"data.exif_orientation={reading.exif_orientation}, but {folder} was prepared with"
            f" exif_orientation={index.exif_orientation}: leave it out, or prepare the data again"
        )
    splits = {split: ShardDataset(index, split) for split, content in index.splits.items() if content.samples}
    return Splits({**splits}, index.exif_orientation)


def _open_parquet_files(folder: Path, reading: Reading) -> Splits:
    train = ParquetDataset(find_parquet_files(folder, "train"))
    splits = {"train": train}
    unused = unused_parquet_files(folder)
    for split in ("val", "test"):
        files = find_parquet_files(folder, split)
        if split == "test" and files and is_unlabelled(files):
            unused += files
        elif files:
            splits[split] = ParquetDataset(files, None if reading.own_classes else train.classes)
    turns = reading.turns(train.classes)
    for dataset in splits.values():
        dataset.exif_orientation = turns
    return Splits({**splits}, turns, _unused(unused, folder))


def _open_idx_folder(folder: Path) -> dict[str, ImageDataset]:
    arrays = {}
    for (split, part), name in IDX_FILES.items():
        path = find_idx_file(folder, split, part)
        if path is None:
            raise ValueError(f"{folder} lacks {name} (or {name}.gz): a folder of idx files needs all four")
        arrays[split, part] = read_idx(path)
    labels = arrays["train", "labels"]
    images = arrays["train", "images"]
    if images.ndim != 3 or not labels.size:
        raise ValueError(f"{folder} holds training images of shape {images.shape}; (N, H, W) with N > 0 is needed")
    classes = tuple(str(label) for label in range(int(labels.max()) + 1))
    # A histogram gives both moments in one pass over uint8, with exact sums.
    counts = np.bincount(images.reshape(-1), minlength=256).astype(np.float64)
    levels = np.arange(256) / 255
    mean = float(counts @ levels / counts.sum())
    std = float(np.sqrt(counts @ (levels - mean) ** 2 / counts.sum())) or 1.0
    return {
        split: ArrayDataset(arrays[split, "images"], arrays[split, "labels"], classes, mean, std)
        for split in ("train", "test")
    }


def _open_image_folder(folder: Path, reading: Reading) -> Splits:
    if not any(visible_folders(folder)) and not any(folder.glob("*")):
        raise ValueError(f"{str(folder)!r} holds no data of a known layout: data.root takes {ACCEPTED}")
    folders = find_splits(folder)
    turns = reading.turns(class_names(folders.of["train"]))
    train = ImageFolderDataset(folders.of["train"], None, reading.endings, turns)
    splits = {"train": train}
    for split in ("val", "test"):
        if split in folders.of:
            classes = None if reading.own_classes else train.classes
            splits[split] = ImageFolderDataset(folders.of[split], classes, reading.endings, turns)
    left_out = sum((dataset.left_out for dataset in splits.values()), Counter[str]())
    remarks = [*_trained_on(folders.of), *([f"{in_words(left_out)} left out"] if left_out else [])]
    return Splits({**splits}, turns, (*remarks, *_unused(folders.unused, folder)))


def _trained_on(folders: Mapping[str, Path]) -> Iterator[str]:
    """Which splits, or classes of them, are folders of training images under another name (a link), in words."""
    training = {path.resolve() for path in (folders["train"], *visible_folders(folders["train"]))}
    for split in folders.keys() - {"train"}:
        same = [path for path in (folders[split], *visible_folders(folders[split])) if path.resolve() in training]
        if same:
            yield f"{same[0]} is a folder of training images: the figures of {folders[split].name} mean nothing"


def _unused(paths: Sequence[Path], folder: Path) -> tuple[str, ...]:
    """Files and folders that no split takes, in words."""
    names = [os.path.relpath(path, folder) for path in paths]
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return (f"not used: {', '.join(names[:NAMED])}{more}",) if names else ()
