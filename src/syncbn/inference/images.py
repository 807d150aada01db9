"""Images that a user names: files, folders and patterns, prepared as a model card says."""

import glob
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from syncbn.data.datasets.base import EncodedDataset, ReadError
from syncbn.data.datasets.decoding import SUFFIXES
from syncbn.data.datasets.image_folder import counts_by_suffix, images_and_others, in_words
from syncbn.data.loading.batches import BatchedImages
from syncbn.data.transforms.evaluation_crops import EvaluationCrops
from syncbn.models.weights import ModelCard


def find_images(sources: Sequence[str]) -> list[Path]:
    """The images that some words name: see `search_images`."""
    return search_images(sources)[0]


def search_images(sources: Sequence[str]) -> tuple[list[Path], Counter[str]]:
    """The images that some words name, and what lies beside them.

    Args:
        sources: Of each the path of a file, taken whatever its name; of a folder, whose images are taken with those in
            the folders in it; or a pattern with ``*``, ``?``, ``[...]`` or ``**``.

    Returns:
        Each image once: in the order of the words, sorted within each. And of the files in folders that are no images
        by their names, how many have which suffix.

    Raises:
        ValueError: A word names nothing, or a folder without an image.
    """
    found: dict[Path, None] = {}
    left_out: Counter[str] = Counter()
    for source in sources:
        path = Path(source).expanduser()
        paths = [path] if path.exists() else [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207 (absolute patterns)
        images: list[Path] = []
        for match in paths:
            of_match, others = images_and_others(match) if match.is_dir() else ([""], [])
            images += [match / name for name in of_match]
            left_out += counts_by_suffix(others)
        if not images:
            what = f"holds no images ({', '.join(SUFFIXES)})" if path.is_dir() else "names no image"
            what += f", but {in_words(left_out)}" if left_out else ""
            raise ValueError(f"{source!r} {what}: name files, folders or a pattern such as 'photos/*.jpg'")
        found |= dict.fromkeys(images)
    return list(found), left_out


class ImageFiles(EncodedDataset):
    """Files of images without labels.

    Args:
        paths: Of the files.
        mean: Per channel on the scale 0..1: three of them for images in RGB, one for grey ones.
        std: Likewise.
        exif_orientation: Whether an image is turned as its EXIF says.
    """

    def __init__(
        self, paths: Sequence[Path], mean: Sequence[float], std: Sequence[float], exif_orientation: bool = False
    ) -> None:
        super().__init__((), np.zeros(len(paths), dtype=np.int64))
        self.exif_orientation = exif_orientation
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
        ImageFiles(paths, [value / 255 for value in mean], [value / 255 for value in std], card.exif_orientation),
        card.image_size,
        crops=EvaluationCrops(card.image_size, card.resize, crops),
        preprocessing=card.preprocessing,
        on_read_error="skip",
    )
