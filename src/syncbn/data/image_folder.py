"""Images in folders, one folder for each class: ``root/<class>/<image>``."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from syncbn.data.decoding import decode

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
"""Of ImageNet's training photos, RGB on the scale 0..1; taken for any set of photos."""


def class_names(folder: Path) -> tuple[str, ...]:
    """Sorted names of the class folders in ``folder``.

    Raises:
        ValueError: There is none.
    """
    names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir()))
    if not names:
        raise ValueError(f"{folder} holds no class folders; images are looked for in {folder}/<class>/")
    return names


class ImageFolderDataset:
    """Photos decoded on demand, RGB.

    Args:
        folder: Holds one folder for each class.
        classes: Names of the classes in the order of their labels; None takes the folders there are, sorted.

    Raises:
        ValueError: A class folder is not in ``classes``, or there is not one image.
    """

    channels = 3
    mean = IMAGENET_MEAN
    std = IMAGENET_STD

    def __init__(self, folder: Path, classes: Sequence[str] | None = None) -> None:
        found = class_names(folder)
        self.classes = tuple(found if classes is None else classes)
        unknown = sorted(set(found) - set(self.classes))
        if unknown:
            raise ValueError(
                f"{folder} holds the class {unknown[0]!r}, which is no class of the training images"
                f" ({len(unknown)} such classes; {len(self.classes)} are known)"
            )
        self.paths: list[Path] = []
        labels: list[int] = []
        for name in found:
            images = sorted(path for path in (folder / name).iterdir() if path.suffix.lower() in SUFFIXES)
            self.paths += images
            labels += [self.classes.index(name)] * len(images)
        if not self.paths:
            raise ValueError(f"{folder} holds no images; files ending in {', '.join(sorted(SUFFIXES))} are read")
        self.labels = np.array(labels, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> np.ndarray:
        """Decode the image at ``index``: uint8 RGB, shape (H, W, 3).

        Raises:
            ValueError: The file cannot be read or decoded; the message names it.
        """
        content = self.encoded(index)
        image = decode(content)
        if image is None:
            raise ValueError(
                f"cannot decode the image {self.paths[index]} ({len(content)} bytes): remove or replace the file"
            )
        return image

    def encoded(self, index: int) -> bytes:
        """The file of the image at ``index``.

        Raises:
            ValueError: It cannot be read; the message names it.
        """
        path = self.paths[index]
        try:
            return path.read_bytes()
        except OSError as error:
            raise ValueError(f"cannot read the image {path}: {error.strerror}") from error

    def label(self, index: int) -> int:
        """The class of the image at ``index``."""
        return int(self.labels[index])
