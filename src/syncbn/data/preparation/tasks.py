"""One shard after another: what goes into each, and the work of making one, which any process can do."""

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from syncbn.data.datasets.shard_files import Shard, file_sha256, shard_name, write_shard
from syncbn.data.preparation.conversion import UnusableImage, convert_image
from syncbn.data.preparation.plan import SourceFinding, SourceImage
from syncbn.files import atomic_file

WORK_FOLDER = ".prepare"
"""In the destination, until the job is finished."""

TAR_OVERHEAD = 1792
"""Bytes that a tar adds to an image: two headers, the label's block, and half a block of padding."""

SIZE_PROBES = 256
"""Images that are made smaller in advance, to know how many will fill a shard."""


@dataclass(frozen=True)
class ShardOptions:
    """What the bytes of the shards depend on besides the source.

    Attributes:
        shorter_side: In pixels; None keeps the images as they are.
        quality: Of JPEG, where images are encoded again.
        shard_megabytes: About how large a shard gets.
        exif_orientation: Whether images are turned as their EXIF says.

    Raises:
        ValueError: One is out of range.
    """

    shorter_side: int | None
    quality: int
    shard_megabytes: float
    exif_orientation: bool = False

    def convert(self, content: bytes) -> tuple[bytes, str]:
        """What `convert_image` makes of a file."""
        return convert_image(content, self.shorter_side, self.quality, self.exif_orientation)

    def __post_init__(self) -> None:
        if self.shorter_side is not None and self.shorter_side < 1:
            raise ValueError(f"shorter_side={self.shorter_side} must be at least 1")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality={self.quality} must be in 1..100")
        if self.shard_megabytes <= 0:
            raise ValueError(f"shard_megabytes={self.shard_megabytes} must be positive")


@dataclass(frozen=True)
class ShardTask:
    """One shard to write: its name, and what goes into it in order."""

    name: str
    split: str
    images: tuple[SourceImage, ...]


@dataclass(frozen=True)
class ShardOutcome:
    """What became of a task.

    Attributes:
        shard: The file.
        places: Of each sample the offset and the size of its image, and its label.
        dropped: Images that could not be kept.
        repaired: Images that were kept, but not as they were.
    """

    shard: Shard
    places: list[tuple[int, int, int]]
    dropped: list[SourceFinding]
    repaired: list[SourceFinding]


def cut_into_shards(
    split: str, images: Sequence[SourceImage], shrinkage: float, shard_megabytes: float
) -> list[ShardTask]:
    """Divide a split among shards, each about as large as asked for.

    Args:
        split: "train", "val" or "test".
        images: In the order in which they are written.
        shrinkage: Bytes of a written image for each byte that it has now.
        shard_megabytes: Size of a shard.
    """
    sizes = np.array([image.size * shrinkage + TAR_OVERHEAD for image in images])
    numbers = (np.cumsum(sizes) - sizes) // (shard_megabytes * 1e6)
    groups = np.split(np.arange(len(images)), np.flatnonzero(np.diff(numbers)) + 1)
    return [
        ShardTask(shard_name(split, number), split, tuple(images[index] for index in group))
        for number, group in enumerate(groups)
        if len(group)
    ]


def measure_shrinkage(images: Sequence[SourceImage], options: ShardOptions, pool: ProcessPoolExecutor) -> float:
    """Bytes of a written image for each byte that it has now, from the first of the images."""
    if options.shorter_side is None or not images:
        return 1.0
    probes = images[:SIZE_PROBES]
    written = sum(pool.map(_written_size, probes, [options] * len(probes), chunksize=8))
    return written / max(sum(image.size for image in probes), 1)


def _written_size(image: SourceImage, options: ShardOptions) -> int:
    try:
        return len(options.convert(read_bytes(image))[0])
    except UnusableImage:
        return 0


def read_bytes(image: SourceImage) -> bytes:
    """The bytes of an image.

    Raises:
        OSError: They cannot be read. Not the image is at fault then but the disk or the network, so that work stops
            rather than goes on without it.
        ValueError: The file is shorter than it was.
    """
    try:
        with Path(image.path).open("rb") as file:
            file.seek(image.offset)
            content = file.read(image.size)
    except OSError as error:
        raise OSError(error.errno, f"cannot read {image.name} ({error.strerror})", image.path) from error
    if len(content) != image.size:
        raise ValueError(f"{image.path} has become shorter while it was read, at {image.name}")
    return content


def outcome_path(destination: Path, task: ShardTask) -> Path:
    """Where the outcome of a shard is noted until the job is finished."""
    return destination / WORK_FOLDER / f"{task.name}.json"


def make_shard(task: ShardTask, destination: Path, options: ShardOptions) -> ShardOutcome:
    """Write a shard, then what became of its images: with the second it is finished.

    Args:
        task: What to write.
        destination: The folder of the shard.
        options: Of the job.

    Raises:
        OSError: An image cannot be read, or the shard not be written.
    """
    dropped: list[SourceFinding] = []
    repaired: list[SourceFinding] = []

    def samples() -> Iterator[tuple[str, bytes, int]]:
        for image in task.images:
            try:
                content, repair = options.convert(read_bytes(image))
            except UnusableImage as reason:
                dropped.append(SourceFinding(task.split, image.name, str(reason), 1))
                continue
            if repair:
                repaired.append(SourceFinding(task.split, image.name, repair, 0))
            yield image.key, content, image.label

    path = destination / task.name
    places = write_shard(path, samples())
    shard = Shard(task.name, len(places), path.stat().st_size, file_sha256(path))
    outcome = ShardOutcome(shard, places, dropped, repaired)
    write_json(outcome_path(destination, task), asdict(outcome))
    return outcome


def finished_outcome(task: ShardTask, destination: Path) -> ShardOutcome | None:
    """What an earlier run made of a task; None where it did not finish it."""
    path = outcome_path(destination, task)
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    shard = Shard(**content["shard"])
    file = destination / shard.name
    if not file.exists() or file.stat().st_size != shard.bytes:
        return None
    return ShardOutcome(
        shard=shard,
        places=[(offset, size, label) for offset, size, label in content["places"]],
        dropped=[SourceFinding(*finding) for finding in content["dropped"]],
        repaired=[SourceFinding(*finding) for finding in content["repaired"]],
    )


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file that is whole or not there."""
    with atomic_file(path) as file:
        file.write(json.dumps(content, indent=1).encode())
