"""Images in folders, one folder for each class: ``root/<class>/<image>``, or deeper within the class."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from syncbn.data.datasets import EncodedDataset, ReadError

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")


def class_names(folder: Path) -> tuple[str, ...]:
    """Sorted names of the class folders in ``folder``, without hidden ones.

    Raises:
        ValueError: There is none.
    """
    names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and entry.name[0] != "."))
    if not names:
        raise ValueError(f"{folder} holds no class folders; images are looked for in {folder}/<class>/")
    return names


def visible_files(folder: Path) -> Iterator[str]:
    """Paths of the files in ``folder`` and the folders in it, relative to it and sorted within each folder.

    Links are followed, but not to where the walk has been or came from; hidden files and folders are left out.
    """
    visited = {_identity(above) for above in (folder.resolve(), *folder.resolve().parents) if above.exists()}

    def is_new(path: str) -> bool:
        identity = _identity(path)
        known = identity in visited
        visited.add(identity)
        return not known

    for parent, folders, names in os.walk(folder, followlinks=True):
        visible = sorted(name for name in folders if name[0] != ".")
        folders[:] = [name for name in visible if is_new(os.path.join(parent, name))]  # noqa: PTH118
        for name in sorted(names):
            if name[0] != ".":
                yield os.path.relpath(os.path.join(parent, name), folder)  # noqa: PTH118 (a million times)


def _identity(path: "str | Path") -> tuple[int, int]:
    """The same for all names of a folder."""
    status = os.stat(path)  # noqa: PTH116
    return status.st_dev, status.st_ino


def image_paths(folder: Path) -> Iterator[str]:
    """Of the `visible_files` those that are images by their names."""
    return (path for path in visible_files(folder) if path.lower().endswith(SUFFIXES))


def holds_images(folder: Path) -> bool:
    """Whether a folder in ``folder`` holds an image."""
    return any(True for entry in folder.iterdir() if entry.is_dir() for _ in image_paths(entry))


class ImageFolderDataset(EncodedDataset):
    """Photos in class folders, decoded on demand to RGB.

    Args:
        folder: Holds one folder for each class.
        classes: Names of the classes in the order of their labels; None takes the folders there are, sorted.

    Raises:
        ValueError: A class folder is not in ``classes``, or there is not one image.
    """

    def __init__(self, folder: Path, classes: Sequence[str] | None = None) -> None:
        found = class_names(folder)
        classes = found if classes is None else classes
        unknown = sorted(set(found) - set(classes))
        if unknown:
            raise ValueError(
                f"{folder} holds the class {unknown[0]!r}, which is no class of the training images"
                f" ({len(unknown)} such classes; {len(classes)} are known)"
            )
        self.folder = folder
        label_of = {name: label for label, name in enumerate(classes)}
        paths: list[bytes] = []
        labels: list[int] = []
        for name in found:
            images = [os.fsencode(f"{name}/{path}") for path in image_paths(folder / name)]
            paths += images
            labels += [label_of[name]] * len(images)
        if not paths:
            raise ValueError(f"{folder} holds no images; files ending in {', '.join(SUFFIXES)} are read")
        super().__init__(classes, np.array(labels, dtype=np.int64))
        # An array, since a million Python objects would be copied to every worker as it counts references to them.
        self._paths = np.array(paths)

    def path(self, index: int) -> Path:
        """The file of the image at ``index``."""
        return self.folder / os.fsdecode(self._paths[index])

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
