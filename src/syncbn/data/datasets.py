"""What a data set is here: images and labels with random access, before augmentation."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from syncbn.data.decoding import DecodingError, decode

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Of ImageNet's training photos, RGB on the scale 0..1; taken for any set of photos."""


class ReadError(ValueError):
    """A sample cannot be read or decoded; the message names its file."""


@dataclass(frozen=True)
class ShardLayout:
    """Which samples lie together on disk, where reading them in order is cheap.

    Attributes:
        starts: Shard s holds the samples starts[s]..starts[s + 1] - 1, in the order of the file: int64,
            shape (S + 1,).
        sizes: Bytes of the shards: int64, shape (S,).
    """

    starts: np.ndarray
    sizes: np.ndarray

    @property
    def num_shards(self) -> int:
        """How many shards there are."""
        return len(self.sizes)


class ImageDataset(Protocol):
    """Images with labels, in random access."""

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

    @property
    def layout(self) -> ShardLayout | None:
        """Which samples lie together on disk; None where every sample is as near as any other."""
        ...

    def __len__(self) -> int: ...

    # And, where photos are to be turned as their EXIF says, an attribute exif_orientation: see applies_orientation;
    # where the files number the classes, an attribute numbers_classes: see the function of this name.

    def encoded(self, index: int) -> bytes | None:
        """The file of the image at ``index``, JPEG or another format; None where only decoded arrays exist.

        Raises:
            ReadError: It cannot be read.
        """
        ...

    def image(self, index: int) -> np.ndarray:
        """The image at ``index``: uint8, shape (H, W, channels).

        Raises:
            ReadError: It cannot be read or decoded.
        """
        ...

    def label(self, index: int) -> int:
        """The class of the image at ``index``, in 0..len(classes) - 1."""
        ...

    def name(self, index: int) -> str:
        """Where the image at ``index`` comes from, for messages."""
        ...


def applies_orientation(dataset: ImageDataset) -> bool:
    """Whether the images of a data set are turned as their EXIF says: not where it has no ``exif_orientation``."""
    return getattr(dataset, "exif_orientation", False)


def numbers_classes(dataset: ImageDataset) -> bool:
    """Whether the files hold the numbers of the classes, whose names are elsewhere or unknown: not by default."""
    return getattr(dataset, "numbers_classes", False)


def decode_image(content: bytes, dataset: ImageDataset, index: int, reduction: int = 1) -> np.ndarray:
    """Decode what ``dataset.encoded(index)`` returned; an EXIF orientation is applied if the data set says so.

    Args:
        content: The file.
        dataset: Where it comes from.
        index: Its number there.
        reduction: 1, 2, 4 or 8: how many pixels in each direction become one.

    Returns:
        uint8, shape (H, W, channels) over the reduction, rounded up.

    Raises:
        ReadError: It is no image, or not a whole one; the message names it.
    """
    try:
        return decode(content, dataset.channels, reduction, applies_orientation(dataset))
    except DecodingError as error:
        name, size = dataset.name(index), len(content)
        raise ReadError(
            f"cannot decode the image {name} ({size} bytes): remove or replace the file ({error})"
        ) from error


class EncodedDataset(ABC):
    """Photos in files, decoded on demand to RGB.

    Args:
        classes: Names of the classes, in the order of their labels.
        labels: Of the images, integers in 0..len(classes) - 1, shape (N,).

    Attributes:
        exif_orientation: Whether a photo is turned as its EXIF says.
    """

    channels = 3
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    layout: ShardLayout | None = None
    exif_orientation: bool = False

    def __init__(self, classes: Sequence[str], labels: np.ndarray) -> None:
        self.classes = tuple(classes)
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def encoded(self, index: int) -> bytes:
        """The file of the image at ``index``.

        Raises:
            ReadError: It cannot be read; the message names it.
        """

    @abstractmethod
    def name(self, index: int) -> str:
        """Where the image at ``index`` comes from, for messages."""

    def image(self, index: int) -> np.ndarray:
        """The image at ``index``: uint8 RGB, shape (H, W, 3).

        Raises:
            ReadError: It cannot be read or decoded; the message names it.
        """
        return decode_image(self.encoded(index), self, index)

    def label(self, index: int) -> int:
        """The class of the image at ``index``."""
        return int(self.labels[index])


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
    layout: ShardLayout | None = None
    numbers_classes = True

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

    def encoded(self, index: int) -> None:
        """None: the images exist decoded only."""
        return None

    def image(self, index: int) -> np.ndarray:
        """The image at ``index``: uint8, shape (H, W, 1)."""
        return self.images[index][:, :, None]

    def label(self, index: int) -> int:
        """The class of the image at ``index``."""
        return int(self.labels[index])

    def name(self, index: int) -> str:
        """The number of the image."""
        return f"number {index}"


class DatasetView:
    """The images of a data set, as another data set shows them.

    Args:
        dataset: Where the images come from.
    """

    def __init__(self, dataset: ImageDataset) -> None:
        self.dataset = dataset
        self.classes = dataset.classes
        self.channels = dataset.channels
        self.mean = dataset.mean
        self.std = dataset.std
        self.exif_orientation = applies_orientation(dataset)
        self.numbers_classes = numbers_classes(dataset)

    def _place(self, index: int) -> int:
        """Of the image at ``index`` in the data set that it comes from."""
        return index

    @property
    def layout(self) -> ShardLayout | None:
        """The shards of the data set."""
        return self.dataset.layout

    def __len__(self) -> int:
        return len(self.dataset)

    def encoded(self, index: int) -> bytes | None:
        """The file of the image at ``index``; None where only decoded arrays exist."""
        return self.dataset.encoded(self._place(index))

    def image(self, index: int) -> np.ndarray:
        """The image at ``index``: uint8, shape (H, W, channels)."""
        return self.dataset.image(self._place(index))

    def label(self, index: int) -> int:
        """The class of the image at ``index``."""
        return self.dataset.label(self._place(index))

    def name(self, index: int) -> str:
        """Where the image at ``index`` comes from, for messages."""
        return self.dataset.name(self._place(index))


class Selection(DatasetView):
    """Some images of a data set, as a data set.

    Args:
        dataset: Where the images come from.
        indices: Which of them, ascending; integers, shape (N,).
    """

    def __init__(self, dataset: ImageDataset, indices: np.ndarray) -> None:
        super().__init__(dataset)
        self.indices = indices

    def _place(self, index: int) -> int:
        return int(self.indices[index])

    @property
    def labels(self) -> np.ndarray:
        """Of the images: int64, shape (N,)."""
        return labels_of(self.dataset)[self.indices]

    @property
    def layout(self) -> ShardLayout | None:
        """The shards of the data set, of which the selection holds a part of the samples."""
        whole = self.dataset.layout
        return None if whole is None else ShardLayout(np.searchsorted(self.indices, whole.starts), whole.sizes)

    def __len__(self) -> int:
        return len(self.indices)


def labels_of(dataset: ImageDataset) -> np.ndarray:
    """The labels of all images of a data set: int64, shape (N,)."""
    labels = getattr(dataset, "labels", None)  # not every data set has them at hand
    if labels is None:
        labels = [dataset.label(index) for index in range(len(dataset))]
    return np.asarray(labels, dtype=np.int64)


def class_counts(dataset: ImageDataset) -> list[int]:
    """How many images of each class a data set holds."""
    return np.bincount(labels_of(dataset), minlength=len(dataset.classes)).tolist()


def hold_out(dataset: ImageDataset, count: int, option: str = "validation_images") -> tuple[Selection, Selection]:
    """Split a data set into what remains and ``count`` images held out, for validation or test.

    The images held out lie evenly spaced over the data set, so that a set sorted by class gives some of
    each class. The choice depends on nothing else: not on the seed, not on the number of ranks.

    Args:
        dataset: The training images, N of them; or what remains of them.
        count: How many to hold out, 0 < count < N.
        option: What the user calls ``count``.

    Returns:
        The N - count images that remain, and the ``count`` held out.

    Raises:
        ValueError: ``count`` is not between 0 and N.
    """
    total = len(dataset)
    if not 0 < count < total:
        left = " left" if isinstance(dataset, Selection) else ""
        raise ValueError(
            f"{option}={count} must lie between 1 and {total - 1}: there are {total} training images{left}"
        )
    held_out = np.arange(count, dtype=np.int64) * total // count
    kept = np.setdiff1d(np.arange(total, dtype=np.int64), held_out, assume_unique=True)
    if isinstance(dataset, Selection):
        whole, indices = dataset.dataset, dataset.indices
        return Selection(whole, indices[kept]), Selection(whole, indices[held_out])
    return Selection(dataset, kept), Selection(dataset, held_out)
