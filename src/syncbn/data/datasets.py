"""What a data set is here: images and labels with random access, before augmentation."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np


class ImageDataset(Protocol):
    """Decoded images with labels, in random access."""

    @property
    def classes(self) -> Sequence[str]:
        """Names of the classes, in the order of their labels."""
        ...

    @property
    def channels(self) -> int:
        """Channels of every image, 1 (grey) or 3 (RGB)."""
        ...

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean per channel of the training images, on the scale 0..1."""
        ...

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation per channel of the training images, on the scale 0..1."""
        ...

    def __len__(self) -> int: ...

    def image(self, index: int) -> np.ndarray:
        """The image at ``index``: uint8, shape (H, W, channels)."""
        ...

    def encoded(self, index: int) -> bytes | None:
        """The file of the image at ``index``, or None where there is none and `image` is all there is."""
        ...

    def label(self, index: int) -> int:
        """The class of the image at ``index``, in 0..len(classes) - 1."""
        ...


class ArrayDataset:
    """Images of one size, all in memory.

    Args:
        images: uint8, shape (N, H, W).
        labels: Integers in 0..len(classes) - 1, shape (N,).
        classes: Names of the classes, in the order of their labels.
        mean: Mean of the training images, on the scale 0..1.
        std: Standard deviation of the training images, on the scale 0..1.

    Raises:
        ValueError: As many images as labels are needed, and every label must name a class.
    """

    channels = 1

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: Sequence[str], mean: float, std: float) -> None:
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise ValueError(
                f"images of shape (N, H, W) and labels of shape (N,) are needed, got {images.shape} and {labels.shape}"
            )
        if labels.size and not 0 <= labels.min() <= labels.max() < len(classes):
            raise ValueError(f"labels must lie in 0..{len(classes) - 1}, got {labels.min()}..{labels.max()}")
        self.images = images
        self.labels = labels
        self.classes = classes
        self.mean = (mean,)
        self.std = (std,)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> np.ndarray:
        """The image at ``index``: uint8, shape (H, W, 1)."""
        return self.images[index][:, :, None]

    def encoded(self, index: int) -> bytes | None:
        """None: the images are decoded."""
        return None

    def label(self, index: int) -> int:
        """The class of the image at ``index``."""
        return int(self.labels[index])


class Selection:
    """Some images of a data set, as a data set.

    Args:
        dataset: Where the images come from.
        indices: Which of them, in order; integers, shape (N,).
    """

    def __init__(self, dataset: ImageDataset, indices: np.ndarray) -> None:
        self.dataset = dataset
        self.indices = indices
        self.classes = dataset.classes
        self.channels = dataset.channels
        self.mean = dataset.mean
        self.std = dataset.std

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, index: int) -> np.ndarray:
        """The image at ``index``: uint8, shape (H, W, channels)."""
        return self.dataset.image(int(self.indices[index]))

    def encoded(self, index: int) -> bytes | None:
        """The file of the image at ``index``, if there is one."""
        return self.dataset.encoded(int(self.indices[index]))

    def label(self, index: int) -> int:
        """The class of the image at ``index``."""
        return self.dataset.label(int(self.indices[index]))


def hold_out(dataset: ImageDataset, count: int) -> tuple[Selection, Selection]:
    """Split a data set into what remains and ``count`` images held out for validation.

    The images held out lie evenly spaced over the data set, so that a set sorted by class gives some of
    each class. The choice depends on nothing else: not on the seed, not on the number of ranks.

    Args:
        dataset: The training images, N of them.
        count: How many to hold out, 0 < count < N.

    Returns:
        The N - count images that remain, and the ``count`` held out.

    Raises:
        ValueError: ``count`` is not between 0 and N.
    """
    total = len(dataset)
    if not 0 < count < total:
        raise ValueError(
            f"validation_images={count} must lie between 1 and {total - 1}: there are {total} training images"
        )
    held_out = np.arange(count, dtype=np.int64) * total // count
    kept = np.setdiff1d(np.arange(total, dtype=np.int64), held_out, assume_unique=True)
    return Selection(dataset, kept), Selection(dataset, held_out)
