"""Images that a user names: files, folders and patterns, prepared as a model card says."""

import glob
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from syncbn.data.batches import BatchedImages
from syncbn.data.datasets import EncodedDataset, ReadError
from syncbn.data.evaluation import EvaluationCrops
from syncbn.data.image_folder import SUFFIXES, image_paths
from syncbn.models.weights import ModelCard


def find_images(sources: Sequence[str]) -> list[Path]:
    """The images that some words name.

    Args:
        sources: Of each the path of a file, taken whatever its name; of a folder, whose images are taken with those in
            the folders in it; or a pattern with ``*``, ``?``, ``[...]`` or ``**``.

    Returns:
        Each file once: in the order of the words, sorted within each.

    Raises:
        ValueError: A word names nothing, or a folder without an image.
    """
    found: dict[Path, None] = {}
    for source in sources:
        path = Path(source).expanduser()
        paths = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207 (absolute patterns)
        images = [image for match in paths for image in _images_at(match)]
        if not images:
            what = f"holds no images ({', '.join(SUFFIXES)})" if path.is_dir() else "names no image"
            raise ValueError(f"{source!r} {what}: name files, folders or a pattern such as 'photos/*.jpg'")
        found |= dict.fromkeys(images)
    return list(found)


def _images_at(path: Path) -> list[Path]:
    return [path / name for name in image_paths(path)] if path.is_dir() else [path]


class ImageFiles(EncodedDataset):
    """Files of images without labels.

    Args:
        paths: Of the files.
        mean: Per channel on the scale 0..1: three of them for images in RGB, one for grey ones.
        std: Likewise.
    """

    def __init__(self, paths: Sequence[Path], mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__((), np.zeros(len(paths), dtype=np.int64))
        self.paths = paths
        self.channels = len(mean)
        self.mean, self.std = tuple(mean), tuple(std)

    def encoded(self, index: int) -> bytes:
        """The file at ``index``.

        Raises:
            ReadError: It cannot be read; the message names it.
        """
        try:
            return self.paths[index].read_bytes()
        except OSError as error:
            raise ReadError(f"cannot read the image {self.paths[index]}: {error.strerror}") from error

    def name(self, index: int) -> str:
        """Path of the file at ``index``."""
        return str(self.paths[index])


def prepare_images(paths: Sequence[Path], card: ModelCard, crops: int = 1) -> BatchedImages:
    """Batches of images as a network wants them; those that cannot be read are left out of their batch.

    Args:
        paths: Of the files.
        card: Of the network.
        crops: Parts of an image that are looked at: 1, 10 or 144.

    Raises:
        ValueError: The card does not say what the network is fed, or there are no such crops.
    """
    mean, std = card.preprocessing.mean, card.preprocessing.std
    if card.image_size is None or mean is None or std is None:
        raise ValueError(
            "the weights do not say what images they were trained on: `syncbn import FILE --image_size N"
            " --mean [...] --std [...]` adds it (checkpoints of `syncbn fit` say it themselves)"
        )
    return BatchedImages(
        ImageFiles(paths, [value / 255 for value in mean], [value / 255 for value in std]),
        card.image_size,
        crops=EvaluationCrops(card.image_size, card.resize, crops),
        preprocessing=card.preprocessing,
        on_read_error="skip",
    )
