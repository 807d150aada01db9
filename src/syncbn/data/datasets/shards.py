"""Images in the shards that ``syncbn prepare`` writes."""

import os
import tarfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from lightning_utilities.core.rank_zero import rank_zero_only

from syncbn.data.datasets.base import EncodedDataset, ReadError, Reading, ShardLayout, Splits
from syncbn.data.datasets.shard_files import INDEX_NAME, ShardIndex, damaged_shards, read_index


class ShardDataset(EncodedDataset):
    """The images of one split, decoded on demand; one shard is open at a time.

    Safe to use after a fork: reads name their place in the file, and share no position with other processes.

    Args:
        index: Of the folder of shards.
        split: ``"train"`` or ``"val"``.
    """

    _open_shard = -1
    _file: Any = None

    def __init__(self, index: ShardIndex, split: str) -> None:
        content = index.splits[split]
        super().__init__(index.classes, content.records["label"])
        self.mean, self.std = index.mean, index.std
        self.folder = index.folder
        self.shards = content.shards
        self.records = content.records
        self.layout = ShardLayout(
            np.append(0, np.cumsum([shard.samples for shard in self.shards])).astype(np.int64),
            np.array([shard.bytes for shard in self.shards], dtype=np.int64),
        )

    def __getstate__(self) -> dict[str, Any]:
        """Without the open file, which belongs to this process."""
        return self.__dict__ | {"_open_shard": -1, "_file": None}

    def encoded(self, index: int) -> bytes:
        """The file of the image at ``index``.

        Raises:
            ReadError: The shard cannot be read, or ends before the image does; the message names both.
        """
        record = self.records[index]
        try:
            content = self._read(int(record["shard"]), int(record["offset"]), int(record["size"]))
        except OSError as error:
            raise ReadError(f"cannot read the image {self.name(index)}: {error.strerror}") from error
        if len(content) != record["size"]:
            raise ReadError(
                f"cannot read the image {self.name(index)}: the file ends early;"
                f" `syncbn prepare check {self.folder}` lists what is damaged"
            )
        return content

    def name(self, index: int) -> str:
        """Shard and member that hold the image at ``index``."""
        record = self.records[index]
        shard = int(record["shard"])
        return f"{self.folder / self.shards[shard].name} ({self._member(shard, int(record['offset']), index)})"

    def _member(self, shard: int, offset: int, index: int) -> str:
        """What the tar calls the image; its number in the shard where the tar cannot be asked."""
        try:
            header = self._read(shard, offset - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
            return tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except (OSError, tarfile.HeaderError):
            assert self.layout is not None
            return f"image {index - int(self.layout.starts[shard])} of the shard"

    def _read(self, shard: int, offset: int, size: int) -> bytes:
        """Bytes of a shard, fewer than ``size`` where it ends before."""
        if shard != self._open_shard:
            self.close()
            self._file = (self.folder / self.shards[shard].name).open("rb", buffering=0)
            self._open_shard = shard
        content = os.pread(self._file.fileno(), size, offset)
        while len(content) < size and (
            more := os.pread(self._file.fileno(), size - len(content), offset + len(content))
        ):
            content += more  # network storage may give less than it is asked for
        return content

    def close(self) -> None:
        """Close the shard that is open, if any."""
        if self._file is not None:
            self._file.close()
        self._open_shard, self._file = -1, None

    def __del__(self) -> None:
        self.close()


DESCRIPTION = "of shards (index.json, from `syncbn prepare`)"


def matches(folder: Path) -> bool:
    """Whether ``folder`` holds shards."""
    return (folder / INDEX_NAME).is_file()


def open_splits(folder: Path, reading: Reading) -> Splits:
    """Open the splits of a folder of shards.

    Raises:
        ValueError: Shards are missing or damaged, there are no training images, or an option contradicts how the shards
            were made.
    """
    index = read_index(folder)
    damaged = damaged_shards(index)
    if damaged and reading.on_read_error != "skip":
        raise ValueError(
            f"{damaged[0]} ({len(damaged)} such shards): prepare the data again, or leave out what is lost by"
            " data.on_read_error=skip"
        )
    for line in damaged if getattr(rank_zero_only, "rank", 0) == 0 else ():  # without Lightning there is no rank
        warnings.warn(f"{line}: its images are left out", stacklevel=2)
    if "train" not in index.splits or not index.splits["train"].samples:
        raise ValueError(f"{folder} holds shards, but none of training images: prepare the data again")
    if reading.exif_orientation not in (None, index.exif_orientation):
        raise ValueError(
            f"data.exif_orientation={reading.exif_orientation}, but {folder} was prepared with"
            f" exif_orientation={index.exif_orientation}: leave it out, or prepare the data again"
        )
    splits = {split: ShardDataset(index, split) for split, content in index.splits.items() if content.samples}
    return Splits({**splits}, index.exif_orientation)
