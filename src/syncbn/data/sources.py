"""From what the user names as data to data sets: the layout is detected."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from lightning_utilities.core.rank_zero import rank_zero_warn

from syncbn.data.batches import OnReadError
from syncbn.data.datasets import ArrayDataset, ImageDataset, hold_out
from syncbn.data.fashion_mnist import fashion_mnist
from syncbn.data.idx import IDX_FILES, find_idx_file, read_idx
from syncbn.data.image_folder import ImageFolderDataset, holds_images
from syncbn.data.parquet import ParquetDataset, find_parquet_files, is_unlabelled
from syncbn.data.shard_dataset import ShardDataset
from syncbn.data.shards import INDEX_NAME, damaged_shards, read_index

EMBEDDED = "fashion-mnist"
"""Name of the images that come with the package."""

ACCEPTED = (
    f"{EMBEDDED!r} (comes with the package), a folder of shards (index.json, from `syncbn prepare`),"
    " of Hugging Face's parquet files (train-*.parquet ...), of MNIST idx files (train-images-idx3-ubyte[.gz] ...),"
    " with train/<class>/ and val/<class>/ of images, or with <class>/ alone"
)


@dataclass(frozen=True)
class ImageSets:
    """The three sets of an experiment.

    Attributes:
        train: What is learned from.
        validation: What the best checkpoint is chosen by.
        test: What the result is reported on. May be the validation set, where there is but one.
    """

    train: ImageDataset
    validation: ImageDataset
    test: ImageDataset


Splits = dict[str, ImageDataset]
"""The splits that are on disk: "train", and those of "val" and "test" that there are."""


def open_image_sets(
    root: str, validation_images: int = 0, own_classes: bool = False, on_read_error: OnReadError = "stop"
) -> ImageSets:
    """Open the data that ``root`` names.

    Args:
        root: ``"fashion-mnist"``, or the path of a folder of shards, parquet files, idx files or class folders.
        validation_images: How many training images to hold out for validation. 0 holds out none; validation
            then takes the data's own validation set, or the test set where there is no other.
        own_classes: Whether validation and test images may be of other classes than the training images, and their
            labels count their own.
        on_read_error: Whether shards that are missing or of another size are an error ("stop") or a warning
            ("skip").

    Returns:
        The training, validation and test images. Where there is but one set to evaluate on, it is both.

    Raises:
        ValueError: There is no such folder, its layout is unknown, or a part of it is missing or broken.
    """
    if validation_images < 0:
        raise ValueError(f"validation_images={validation_images} must not be negative")
    splits = _open_splits(root, own_classes, on_read_error)
    train = splits["train"]
    if validation_images:
        test = splits.get("test") or splits.get("val")
        train, validation = hold_out(train, validation_images)
        return ImageSets(train, validation, test or validation)
    evaluation = splits.get("val") or splits.get("test")
    if evaluation is None:
        raise ValueError(
            f"{root} has training images, but neither val nor test to evaluate on: hold out some of the"
            f" {len(train):,} training images, as by data.validation_images={max(1, len(train) // 20)}"
        )
    return ImageSets(train, evaluation, splits.get("test") or evaluation)


def open_training_set(root: str) -> ImageDataset:
    """Open the training images alone of the data that ``root`` names; errors as in `open_image_sets`."""
    return _open_splits(root)["train"]


def _open_splits(root: str, own_classes: bool = False, on_read_error: OnReadError = "stop") -> Splits:
    """The splits as they are on disk."""
    if root == EMBEDDED:
        return {split: fashion_mnist(split) for split in ("train", "test")}
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise ValueError(f"no data at {root!r}: data.root takes {ACCEPTED}")
    if (folder / INDEX_NAME).is_file():
        return _open_shards(folder, on_read_error)
    if any(find_idx_file(folder, split, part) for split, part in IDX_FILES):
        return _open_idx_folder(folder)
    if find_parquet_files(folder, "train"):
        return _open_parquet_files(folder, own_classes)
    if (folder / "train").is_dir():
        return _open_image_folder(folder, own_classes)
    if holds_images(folder) and not any((folder / split).is_dir() for split in ("val", "test")):
        return {"train": ImageFolderDataset(folder)}
    raise ValueError(f"{root!r} holds no data of a known layout: data.root takes {ACCEPTED}")


def _open_shards(folder: Path, on_read_error: OnReadError) -> Splits:
    index = read_index(folder)
    damaged = damaged_shards(index)
    if damaged and on_read_error == "stop":
        raise ValueError(
            f"{damaged[0]} ({len(damaged)} such shards): prepare the data again, or leave out what is lost by"
            " data.on_read_error=skip"
        )
    for line in damaged:
        rank_zero_warn(f"{line}: its images are left out")
    if "train" not in index.splits or not index.splits["train"].samples:
        raise ValueError(f"{folder} holds shards, but none of training images: prepare the data again")
    return {split: ShardDataset(index, split) for split, content in index.splits.items() if content.samples}


def _open_parquet_files(folder: Path, own_classes: bool) -> Splits:
    train = ParquetDataset(find_parquet_files(folder, "train"))
    splits: Splits = {"train": train}
    for split in ("val", "test"):
        files = find_parquet_files(folder, split)
        if files and not (split == "test" and is_unlabelled(files)):
            splits[split] = ParquetDataset(files, None if own_classes else train.classes)
    return splits


def _open_idx_folder(folder: Path) -> Splits:
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


def _open_image_folder(folder: Path, own_classes: bool) -> Splits:
    train = ImageFolderDataset(folder / "train")
    splits: Splits = {"train": train}
    for split in ("val", "test"):
        if (folder / split).is_dir():
            splits[split] = ImageFolderDataset(folder / split, None if own_classes else train.classes)
    return splits
