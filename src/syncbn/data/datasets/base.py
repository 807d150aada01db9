"""What a data set is here: images and labels with random access, before augmentation."""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from syncbn.data.datasets.decoding import SUFFIXES, DecodingError, decode

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Of ImageNet's training photos, RGB on the scale 0..1; taken for any set of photos."""


OnReadError = Literal["look", "stop", "skip"]
"""What an image that cannot be read or decoded does: it is looked for at the start and left out, with a warning where
it is met later; it ends the run; or it is left out of its batch and counted."""


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


WNID = re.compile(r"n\d{8}")


def is_imagenet(classes: Sequence[str]) -> bool:
    """Whether classes are ImageNet's, by their names, which are identifiers of WordNet ("n01440764").

    Its labels and accuracies are about pixels as stored: an EXIF orientation is not to be applied.
    """
    return all(WNID.fullmatch(name) for name in classes)


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
        on_read_error: Whether shards that are missing or of another size are a warning ("skip") or an error (else).
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
