"""Shards: a data set as a few large tar files that WebDataset reads too, and an index that finds every sample.

A folder of shards holds::

    index.json                          classes, counts, and each shard's size and SHA-256
    train.samples.npy, val.samples.npy  where each sample lies: SAMPLE_DTYPE, in shard order, then file order
    train-000000.tar, ...               two members a sample: <key>.jpg, then <key>.cls with the label in ASCII

Images are JPEG. Their pixels are to be taken as stored: an EXIF orientation is never meant. Whether it was applied when
the shards were made is noted in the index; where that says nothing, it was not.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from syncbn.files import atomic_file

INDEX_FORMAT = 1
INDEX_NAME = "index.json"

SAMPLE_DTYPE = np.dtype([("shard", "<i4"), ("offset", "<i8"), ("size", "<i4"), ("label", "<i4")])
"""One sample: the number of its shard in its split, and where in the tar the bytes of its image begin."""


@dataclass(frozen=True)
class Shard:
    """One tar file.

    Attributes:
        name: Of the file, in the folder of the index.
        samples: How many it holds.
        bytes: Its size.
        sha256: Of the whole file, in hexadecimal digits.
    """

    name: str
    samples: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardSplit:
    """The training or the validation samples.

    Attributes:
        samples: How many there are.
        per_class: How many of each class.
        shards: The files, in order.
        records: (samples,) of SAMPLE_DTYPE, in shard order, then file order.
    """

    samples: int
    per_class: tuple[int, ...]
    shards: tuple[Shard, ...]
    records: np.ndarray


@dataclass(frozen=True)
class ShardIndex:
    """What a folder of shards holds.

    Attributes:
        folder: Where the files are.
        classes: Their identifiers (ImageNet's wnids, or names of folders), in the order of the labels.
        class_names: Their names for people, in the same order.
        mean: Of the red, green and blue of the images, on the scale 0..1.
        std: Likewise.
        splits: By name, "train", "val" and, where there is one, "test".
        exif_orientation: Whether images were turned as their EXIF said.
    """

    folder: Path
    classes: tuple[str, ...]
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    splits: dict[str, ShardSplit]
    exif_orientation: bool = False


def damaged_shards(index: ShardIndex) -> list[str]:
    """Of each shard that is missing or of another size than the index says its path and what is wrong, in order."""
    damaged = []
    for split in index.splits.values():
        for shard in split.shards:
            path = index.folder / shard.name
            size = path.stat().st_size if path.is_file() else None
            if size != shard.bytes:
                state = "is missing" if size is None else f"has {size} bytes, the index says {shard.bytes}"
                damaged.append(f"{path} {state}")
    return damaged


def make_split(shards: Sequence[Shard], records: np.ndarray, num_classes: int) -> ShardSplit:
    """A split from its shards and the records of all their samples, (N,) of SAMPLE_DTYPE."""
    per_class = np.bincount(records["label"], minlength=num_classes)
    return ShardSplit(len(records), tuple(per_class.tolist()), tuple(shards), records)


# ---- reading -------------------------------------------------------------------------------------


def read_index(folder: str | Path) -> ShardIndex:
    """Read the index of a folder of shards; the shards themselves are not looked at.

    Args:
        folder: What ``syncbn prepare`` wrote.

    Returns:
        The index, with the records of every sample.

    Raises:
        ValueError: A file of the index is missing, broken, of another format, or contradicts another;
            the message names it.
    """
    folder = Path(folder)
    path = folder / INDEX_NAME
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ValueError(
            f"{folder} holds no finished shards: cannot read {path} ({error.strerror}); `syncbn prepare` writes it"
        ) from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error}): prepare the data again") from error
    found = content.get("format") if isinstance(content, dict) else None
    if found != INDEX_FORMAT:
        raise ValueError(f"{path} is of format {found!r}; format {INDEX_FORMAT} is read: prepare the data again")
    try:
        classes = tuple(content["classes"])
        return ShardIndex(
            folder=folder,
            classes=classes,
            class_names=tuple(content["class_names"]),
            mean=tuple(content["mean"]),
            std=tuple(content["std"]),
            splits={name: _read_split(folder, name, split, len(classes)) for name, split in content["splits"].items()},
            exif_orientation=bool(content.get("exif_orientation", False)),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} lacks a part or holds a malformed one ({error}): prepare the data again") from error


def _read_split(folder: Path, name: str, content: dict[str, Any], num_classes: int) -> ShardSplit:
    """One split of an index, checked against the records of its samples."""
    path = records_path(folder, name)
    try:
        records = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"cannot read {path}: {error}; prepare the data again") from error
    if records.dtype != SAMPLE_DTYPE or records.ndim != 1:
        raise ValueError(f"{path} holds {records.dtype} of shape {records.shape}, not ({SAMPLE_DTYPE},)")
    if records.size and (records["label"].min() < 0 or records["label"].max() >= num_classes):
        raise ValueError(f"{path} holds labels outside of the {num_classes} classes of {INDEX_NAME}")
    split = make_split([Shard(**shard) for shard in content["shards"]], records, num_classes)
    counts = np.repeat(np.arange(len(split.shards)), [shard.samples for shard in split.shards])
    if not np.array_equal(records["shard"], counts):
        raise ValueError(f"{path} and {folder / INDEX_NAME} disagree about the samples of each shard")
    if (content["samples"], tuple(content["per_class"])) != (split.samples, split.per_class):
        raise ValueError(f"{path} and {folder / INDEX_NAME} disagree about the samples of each class")
    return split


def records_path(folder: Path, split: str) -> Path:
    """The file with the records of a split."""
    return folder / f"{split}.samples.npy"


# ---- writing -------------------------------------------------------------------------------------


def write_index(index: ShardIndex) -> None:
    """Write an index to its folder, ``index.json`` last: where that is, everything is."""
    for name, split in index.splits.items():
        with atomic_file(records_path(index.folder, name)) as file:
            np.save(file, split.records)
    splits = {
        name: {
            "samples": split.samples,
            "per_class": split.per_class,
            "shards": [asdict(shard) for shard in split.shards],
        }
        for name, split in index.splits.items()
    }
    content = {
        "format": INDEX_FORMAT,
        "classes": index.classes,
        "class_names": index.class_names,
        "mean": index.mean,
        "std": index.std,
        "exif_orientation": index.exif_orientation,
        "splits": splits,
    }
    with atomic_file(index.folder / INDEX_NAME) as file:
        file.write(json.dumps(content, indent=1).encode())


def write_shard(path: Path, samples: Iterable[tuple[str, bytes, int]]) -> list[tuple[int, int, int]]:
    """Write one shard: its bytes are a function of the samples alone, and nothing is at ``path`` before the end.

    Args:
        path: Of the shard.
        samples: Of each its key (names it in its split; without the characters that `sample_key` replaces), the
            bytes of a JPEG file, and the label of its class.

    Returns:
        Of each sample where in the file its image begins, the size of the image in bytes, and the label.
    """
    places = []
    with atomic_file(path) as file, tarfile.open(fileobj=file, mode="w:", format=tarfile.PAX_FORMAT) as archive:
        for key, image, label in samples:
            assert key == sample_key(key), key
            _append(archive, f"{key}.jpg", image)
            padded = -(-len(image) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            places.append((file.tell() - padded, len(image), label))
            _append(archive, f"{key}.cls", str(label).encode())
    return places


def _append(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Append a member of time 0, user 0 and group 0, whose bytes depend on the arguments alone."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, io.BytesIO(content))


def sample_key(name: str) -> str:
    """A name as a key: ``.`` and ``/``, which mean something to WebDataset, become ``_``."""
    return name.replace("/", "_").replace(".", "_")


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits.

    Raises:
        OSError: It cannot be read.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def shard_name(split: str, number: int) -> str:
    """The name of a shard."""
    return f"{split}-{number:06d}.tar"
