"""Whether the files of finished shards are still what was written."""

import tarfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from syncbn.data.datasets.shard_files import Shard, ShardIndex, file_sha256
from syncbn.data.preparation.workers import finished, progress_bar


def check_shards(index: ShardIndex, pool: ProcessPoolExecutor) -> list[str]:
    """Compare every shard with the index.

    Returns:
        Of each bad shard its path and what is wrong with it, sorted.
    """
    items = [
        (shard, split.records[split.records["shard"] == number])
        for split in index.splits.values()
        for number, shard in enumerate(split.shards)
    ]
    bad = []
    with progress_bar() as progress:
        bar = progress.add_task("checking images", total=sum(shard.samples for shard, _ in items))
        for (shard, _), flaw in finished(pool, check_shard, items, index.folder):
            if flaw:
                bad.append(f"{index.folder / shard.name}: {flaw}")
            progress.advance(bar, shard.samples)
    return sorted(bad)


def check_shard(item: tuple[Shard, np.ndarray], folder: Path) -> str:
    """What is wrong with a shard; empty if nothing.

    Args:
        item: The shard, and the records of its samples as the index has them.
        folder: Of the shard.
    """
    shard, records = item
    path = folder / shard.name
    try:
        size = path.stat().st_size
        if size != shard.bytes:
            return f"has {size} bytes, the index says {shard.bytes}"
        digest = file_sha256(path)
        if digest != shard.sha256:
            return f"has the SHA-256 {digest}, the index says {shard.sha256}"
        found = _read_places(path)
    except (OSError, tarfile.TarError, ValueError) as error:
        return f"cannot be read: {error}"
    indexed = [tuple(int(record[field]) for field in ("offset", "size", "label")) for record in records]
    return "" if found == indexed else "its members are not where the index says"


def _read_places(path: Path) -> list[tuple[int, int, int]]:
    """Of each sample in a shard the offset and the size of its image, and its label."""
    places = []
    with tarfile.open(path, "r:") as archive:
        members = archive.getmembers()
        for image, label in zip(members[::2], members[1::2], strict=True):
            if (Path(image.name).suffix, label.name) != (".jpg", str(Path(image.name).with_suffix(".cls"))):
                raise ValueError(f"{image.name} is followed by {label.name}")
            content = archive.extractfile(label)
            assert content is not None
            places.append((image.offset_data, image.size, int(content.read())))
    return places
