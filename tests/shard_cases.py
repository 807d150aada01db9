"""Small shards of random photos, and what global batches of them come to."""

import hashlib
from pathlib import Path

import cv2
import numpy as np
from torch.utils.data import DataLoader

from syncbn.data import Augmentation, BatchedImages, GlobalBatchSampler, ImageBatch, ShardDataset, WindowedOrder
from syncbn.data.datasets.base import OnReadError
from syncbn.data.datasets.shard_files import (
    SAMPLE_DTYPE,
    Shard,
    ShardIndex,
    ShardSplit,
    file_sha256,
    make_split,
    read_index,
    shard_name,
    write_index,
    write_shard,
)
from syncbn.data.loading.batches import keep_batch
from syncbn.data.loading.window_reader import WindowReader

CLASSES = ("ant", "bee", "cat")
TRAIN_SHARDS = (9, 8, 9, 0, 8, 9)  # 43 samples: prime, and a shard without any
GLOBAL_BATCH_SIZE = 8
SEED = 3
SHUFFLE_WINDOW = 2


def encoded_photo(number: int, suffix: str = ".jpg") -> bytes:
    """A photo of its own size and content for every number."""
    pixels = np.random.default_rng(number).integers(0, 256, (16 + number % 5, 20, 3), dtype=np.uint8)
    written, content = cv2.imencode(suffix, pixels)
    assert written
    return content.tobytes()


def make_shards(folder: Path, train: tuple[int, ...] = TRAIN_SHARDS, val: tuple[int, ...] = (5,)) -> Path:
    """Write shards of so many samples each."""
    folder.mkdir(parents=True, exist_ok=True)
    splits = {split: _write_split(folder, split, sizes) for split, sizes in (("train", train), ("val", val))}
    third = (0.5, 0.4, 0.3)
    write_index(ShardIndex(folder, CLASSES, CLASSES, third, third, splits))
    return folder


def _write_split(folder: Path, split: str, sizes: tuple[int, ...]) -> ShardSplit:
    shards, records, first = [], [], 0
    for number, size in enumerate(sizes):
        path = folder / shard_name(split, number)
        samples = [(f"{split}_{i}", encoded_photo(i), i % len(CLASSES)) for i in range(first, first + size)]
        records += [(number, *place) for place in write_shard(path, samples)]
        shards.append(Shard(path.name, size, path.stat().st_size, file_sha256(path)))
        first += size
    return make_split(shards, np.array(records, SAMPLE_DTYPE), len(CLASSES))


def train_set(folder: Path) -> ShardDataset:
    """The training images."""
    return ShardDataset(read_index(folder), "train")


def train_loader(
    dataset: ShardDataset,
    *,
    rank: int = 0,
    num_ranks: int = 1,
    num_workers: int = 0,
    place: tuple[int, int] = (0, 0),
    drop_last: bool = True,
    accumulate: int = 1,
    on_read_error: OnReadError = "stop",
) -> DataLoader[ImageBatch]:
    """What a rank's training loader is in the DataModule."""
    order = WindowedOrder(dataset.layout, SHUFFLE_WINDOW, SEED)
    sampler = GlobalBatchSampler(
        len(dataset),
        GLOBAL_BATCH_SIZE,
        rank=rank,
        num_ranks=num_ranks,
        accumulate_grad_batches=accumulate,
        drop_last=drop_last,
        order=order,
    )
    sampler.set_position(*place)
    reader = WindowReader(dataset, sampler, order)
    images = BatchedImages(dataset, 16, Augmentation(), SEED, reader=reader, on_read_error=on_read_error)
    return DataLoader(
        images,
        batch_sampler=sampler,
        collate_fn=keep_batch,
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
    )


def digest_of(batches: list[ImageBatch]) -> str:
    """A hash of the pixels, labels and numbers of a global batch, given as the shares of its ranks and passes."""
    digest = hashlib.sha256()
    for part in ("images", "labels", "indices"):
        for batch in batches:
            digest.update(getattr(batch, part).numpy().tobytes())
    return digest.hexdigest()
