"""From what the user names as data to data sets: the layout is detected."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from syncbn.data.datasets import ArrayDataset, ImageDataset, hold_out
from syncbn.data.fashion_mnist import fashion_mnist
from syncbn.data.idx import IDX_FILES, find_idx_file, read_idx
from syncbn.data.image_folder import ImageFolderDataset

EMBEDDED = "fashion-mnist"
"""Name of the images that come with the package."""

ACCEPTED = (
    f"{EMBEDDED!r} (comes with the package), a folder of MNIST idx files (train-images-idx3-ubyte[.gz] ...)"
    " or a folder with train/<class>/ and val/<class>/ of images"
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


def open_image_sets(root: str, validation_images: int = 0) -> ImageSets:
    """Open the data that ``root`` names.

    Args:
        root: ``"fashion-mnist"``, or the path of a folder of idx files or of class folders.
        validation_images: How many training images to hold out for validation. 0 holds out none; validation
            then takes the data's own validation set, or the test set where there is no other.

    Returns:
        The training, validation and test images.

    Raises:
        ValueError: There is no such folder, its layout is unknown, or a part of it is missing or broken.
    """
    if validation_images < 0:
        raise ValueError(f"validation_images={validation_images} must not be negative")
    train, validation, test = _open_splits(root)
    if validation_images:
        train, validation = hold_out(train, validation_images)
    return ImageSets(train, validation, test)


def _open_splits(root: str) -> tuple[ImageDataset, ImageDataset, ImageDataset]:
    """The splits as they are on disk; a missing validation set is replaced by the test set, or reversely."""
    if root == EMBEDDED:
        test = fashion_mnist("test")
        return fashion_mnist("train"), test, test
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise ValueError(f"no data at {root!r}: data.root takes {ACCEPTED}")
    if any(find_idx_file(folder, split, part) for split, part in IDX_FILES):
        return _open_idx_folder(folder)
    if (folder / "train").is_dir():
        return _open_image_folder(folder)
    raise ValueError(f"{root!r} holds no data of a known layout: data.root takes {ACCEPTED}")


def _open_idx_folder(folder: Path) -> tuple[ImageDataset, ImageDataset, ImageDataset]:
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
    train, test = (
        ArrayDataset(arrays[split, "images"], arrays[split, "labels"], classes, mean, std)
        for split in ("train", "test")
    )
    return train, test, test


def _open_image_folder(folder: Path) -> tuple[ImageDataset, ImageDataset, ImageDataset]:
    train = ImageFolderDataset(folder / "train")
    evaluation = {
        split: ImageFolderDataset(folder / split, train.classes)
        for split in ("val", "test")
        if (folder / split).is_dir()
    }
    if not evaluation:
        raise ValueError(f"{folder} has a folder train, but neither val nor test to evaluate on")
    validation = evaluation.get("val") or evaluation["test"]
    return train, validation, evaluation.get("test") or validation
