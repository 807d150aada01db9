"""Images in the shards that ``syncbn prepare`` writes."""

import os
import tarfile
from typing import Any

import numpy as np

from syncbn.data.datasets.base import EncodedDataset, ReadError, ShardLayout
from syncbn.data.datasets.shard_files import ShardIndex


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
