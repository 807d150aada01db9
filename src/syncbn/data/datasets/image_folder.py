"""Images in folders, one folder for each class: ``root/<class>/<image>``, or deeper within the class."""

import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from syncbn.data.datasets.base import EncodedDataset, ReadError, Reading, Splits
from syncbn.data.datasets.decoding import SUFFIXES
from syncbn.data.datasets.splits import find_splits, is_visible, not_used, visible_folders

DESCRIPTION = "with train/<class>/ and val/<class>/ of images, or with <class>/ alone"

SYSTEM_FILES = ("thumbs.db", "desktop.ini")
"""Which systems put beside images, in small letters: not counted as left out."""


def class_names(folder: Path) -> tuple[str, ...]:
    """Sorted names of the class folders in ``folder``, without hidden ones and what systems leave behind.

    Raises:
        ValueError: There is none.
    """
    names = tuple(entry.name for entry in visible_folders(folder))
    if not names:
        raise ValueError(f"{folder} holds no class folders; images are looked for in {folder}/<class>/")
    return names


def visible_files(folder: Path) -> Iterator[str]:
    """Paths of the files in ``folder`` and the folders in it, relative to it and sorted within each folder.

    Links are followed, but not to where the walk has been or came from; hidden files and folders are left out, and
    what systems leave behind.
    """
    visited = {_identity(above) for above in (folder.resolve(), *folder.resolve().parents) if above.exists()}

    def is_new(path: str) -> bool:
        identity = _identity(path)
        known = identity in visited
        visited.add(identity)
        return not known

    for parent, folders, names in os.walk(folder, followlinks=True):
        visible = sorted(name for name in folders if is_visible(name))
        folders[:] = [name for name in visible if is_new(os.path.join(parent, name))]  # noqa: PTH118
        for name in sorted(names):
            if name[0] != "." and name.lower() not in SYSTEM_FILES:
                yield os.path.relpath(os.path.join(parent, name), folder)  # noqa: PTH118 (a million times)


def _identity(path: "str | Path") -> tuple[int, int]:
    """The same for all names of a folder."""
    status = os.stat(path)  # noqa: PTH116
    return status.st_dev, status.st_ino


def images_and_others(folder: Path, suffixes: Sequence[str] = SUFFIXES) -> tuple[list[str], list[str]]:
    """The `visible_files` that are images by their names, and the others."""
    images: list[str] = []
    others: list[str] = []
    endings = tuple(suffixes)
    for path in visible_files(folder):
        (images if path.lower().endswith(endings) else others).append(path)
    return images, others


def counts_by_suffix(paths: Iterable[str]) -> Counter[str]:
    """How many files have which suffix."""
    return Counter(os.path.splitext(path)[1].lower() or "without suffix" for path in paths)  # noqa: PTH122


def in_words(counts: Counter[str]) -> str:
    """How many files have which suffix, the most frequent first: "20 .heic, 3 .txt"."""
    return ", ".join(f"{count:,} {suffix}" for suffix, count in counts.most_common())


class ImageFolderDataset(EncodedDataset):
    """Photos in class folders, decoded on demand to RGB.

    Args:
        folder: Holds one folder for each class.
        classes: Names of the classes in the order of their labels; None takes the folders there are, sorted.
        suffixes: Endings, in small letters, of the names of the files that are taken as images.
        exif_orientation: Whether a photo is turned as its EXIF says.

    Attributes:
        left_out: Of the other files in the class folders, how many have which suffix.

    Raises:
        ValueError: A class folder is not in ``classes``, or holds no image.
    """

    def __init__(
        self,
        folder: Path,
        classes: Sequence[str] | None = None,
        suffixes: Sequence[str] = SUFFIXES,
        exif_orientation: bool = False,
    ) -> None:
        found = class_names(folder)
        may_be_empty = classes is not None  # of these classes there need not be images of each
        classes = found if classes is None else classes
        unknown = sorted(set(found) - set(classes))
        if unknown:
            raise ValueError(
                f"{folder} holds the class {unknown[0]!r}, which is no class of the training images"
                f" ({len(unknown)} such classes; {len(classes)} are known){look_alike(unknown[0], classes)}"
            )
        self.folder = folder
        self.exif_orientation = exif_orientation
        self.left_out: Counter[str] = Counter()
        label_of = {name: label for label, name in enumerate(classes)}
        paths: list[bytes] = []
        labels: list[int] = []
        for name in found:
            images, others = images_and_others(folder / name, suffixes)
            if not images and (others or not may_be_empty):
                raise ValueError(no_image_of(folder / name, others, suffixes))
            paths += [os.fsencode(f"{name}/{path}") for path in images]
            labels += [label_of[name]] * len(images)
            self.left_out += counts_by_suffix(others)
        if not paths:
            raise ValueError(f"{folder} holds no images; files ending in {', '.join(suffixes)} are read")
        super().__init__(classes, np.array(labels, dtype=np.int64))
        # An array, since a million Python objects would be copied to every worker as it counts references to them.
        self._paths = np.array(paths)

    def path(self, index: int) -> Path:
        """The file of the image at ``index``."""
        return self.folder / os.fsdecode(self._paths[index])

    def places_of(self, paths: Iterable[Path]) -> np.ndarray:
        """The numbers of the images at some paths, ascending; a path that is no image's counts for nothing."""
        names = [os.fsencode(os.path.relpath(path, self.folder)) for path in paths]
        return np.flatnonzero(np.isin(self._paths, np.array(names or [b""])))

    def encoded(self, index: int) -> bytes:
        """The file of the image at ``index``.

        Raises:
            ReadError: It cannot be read; the message names it.
        """
        try:
            return self.path(index).read_bytes()
        except OSError as error:
            raise ReadError(f"cannot read the image {self.path(index)}: {error.strerror}") from error

    def name(self, index: int) -> str:
        """Path of the image at ``index``."""
        return str(self.path(index))


def look_alike(name: str, classes: Sequence[str]) -> str:
    """What to do about a name that is a class's but for capitals, blanks at its ends or the form of its Unicode."""

    def plain(text: str) -> str:
        return unicodedata.normalize("NFC", text).strip().casefold()

    like = next((known for known in classes if plain(known) == plain(name)), None)
    return "" if like is None else f"; it looks like {like!a} but is {name!a}: give both folders one name"


def no_image_of(folder: Path, others: Sequence[str], suffixes: Sequence[str] = SUFFIXES) -> str:
    """What is wrong with the folder of a class without images, in words; ``others`` are the files in it."""
    if not others:
        return f"the class {folder.name} has no image: {folder} is empty; remove it"
    return (
        f"the class {folder.name} has no image: {folder} holds {in_words(counts_by_suffix(others))}; convert them, or"
        f" remove the folder (files ending in {', '.join(suffixes)} are read)"
    )


def matches(folder: Path) -> bool:
    """Whether ``folder`` holds anything at all: this format is asked last."""
    return any(visible_folders(folder)) or any(folder.glob("*"))


def open_splits(folder: Path, reading: Reading) -> Splits:
    """Open the splits of a folder of class folders.

    Raises:
        ValueError: There are no class folders, or one without an image.
    """
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
    return Splits({**splits}, turns, (*remarks, *not_used(folders.unused, folder)))


def _trained_on(folders: Mapping[str, Path]) -> Iterator[str]:
    """Which splits, or classes of them, are folders of training images under another name (a link), in words."""
    training = {path.resolve() for path in (folders["train"], *visible_folders(folders["train"]))}
    for split in folders.keys() - {"train"}:
        same = [path for path in (folders[split], *visible_folders(folders[split])) if path.resolve() in training]
        if same:
            yield f"{same[0]} is a folder of training images: the figures of {folders[split].name} mean nothing"
