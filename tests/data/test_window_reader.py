"""The same global batches on any number of ranks and workers, read forwards and ahead of need."""

import os
import pickle
from collections import Counter

import numpy as np
import pytest
from torch.utils.data import DataLoader

from shard_cases import GLOBAL_BATCH_SIZE, digest_of, make_shards, train_loader, train_set
from syncbn.data import WindowedOrder
from syncbn.data.loading import window_reader as reader_module
from syncbn.data.loading.window_reader import bytes_held

pytestmark = pytest.mark.filterwarnings("ignore:.*suggested max number of worker:UserWarning")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_shards(tmp_path_factory.mktemp("shards"))


def digests(folder, num_ranks, num_workers, *, epoch=1, first=0, accumulate=1, drop_last=False) -> list[str]:
    """Of each global batch of an epoch, put together from the real loaders of all ranks."""
    place = (epoch, first * accumulate)
    ranks = []
    for rank in range(num_ranks):
        loader = train_loader(
            train_set(folder),
            rank=rank,
            num_ranks=num_ranks,
            num_workers=num_workers,
            place=place,
            accumulate=accumulate,
            drop_last=drop_last,
        )
        ranks.append(list(loader))
    passes = list(zip(*ranks, strict=True))
    starts = range(0, len(passes), accumulate)
    return [digest_of([share for part in passes[i : i + accumulate] for share in part]) for i in starts]


@pytest.fixture(scope="module")
def expected(folder):
    """Made from the images themselves: nothing is read ahead, no loader takes part."""
    loader = train_loader(train_set(folder), drop_last=False, place=(1, 0))
    images = loader.dataset
    images.reader = None
    found = [digest_of([images.__getitems__(keys)]) for keys in loader.batch_sampler]
    assert len(found) == len(set(found)) == 6  # 43 samples in batches of 8, the last of 3
    return found


@pytest.mark.parametrize("num_workers", [0, 2, 3])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_global_batches_do_not_depend_on_ranks_or_workers(folder, expected, num_ranks, num_workers):
    assert digests(folder, num_ranks, num_workers) == expected


@pytest.mark.parametrize(("num_ranks", "num_workers", "first"), [(1, 0, 5), (4, 0, 3), (2, 3, 2), (8, 0, 1)])
def test_they_go_on_at_any_step_on_another_number_of_ranks(folder, expected, num_ranks, num_workers, first):
    assert digests(folder, num_ranks, num_workers, first=first) == expected[first:]


@pytest.mark.parametrize(("num_ranks", "accumulate"), [(1, 2), (2, 4), (1, 8)])
def test_nor_do_they_depend_on_accumulation(folder, expected, num_ranks, accumulate):
    assert digests(folder, num_ranks, 0, accumulate=accumulate) == expected


def test_the_incomplete_batch_is_dropped_or_kept_with_empty_shares(folder, expected):
    assert digests(folder, 2, 0, drop_last=True) == expected[:5]
    shares = [list(train_loader(train_set(folder), rank=r, num_ranks=8, drop_last=False))[-1] for r in range(8)]
    assert sorted(len(share.labels) for share in shares) == [0] * 5 + [1] * 3
    assert all(share.images.shape[1:] == (3, 16, 16) for share in shares)


def test_epochs_differ_and_persistent_workers_go_on(folder):
    loader = train_loader(train_set(folder), num_workers=2)
    epochs = []
    for epoch in (0, 1):
        loader.batch_sampler.set_epoch(epoch)
        epochs.append([digest_of([batch]) for batch in loader])
    assert not set(epochs[0]) & set(epochs[1])
    assert epochs[1] == digests(folder, 1, 0, drop_last=True)


# ---- how it is read ------------------------------------------------------------------------------


class Reads:
    """Notes where reads begin: (file, offset), in order; and keeps what is held in memory."""

    def __init__(self, monkeypatch, dataset):
        self.places: list[tuple[int, int]] = []
        original = os.pread

        def pread(descriptor, size, offset):
            self.places.append((dataset._open_shard, offset))
            return original(descriptor, size, offset)

        monkeypatch.setattr(os, "pread", pread)


class Worker:
    """What a DataLoader tells a worker process."""

    def __init__(self, id, num_workers):
        self.id, self.num_workers = id, num_workers


def batches_of_worker(loader: DataLoader, id: int, num_workers: int, epochs: range):
    """The batches that a DataLoader deals to one of its workers, made in this process."""
    for epoch in epochs:
        loader.batch_sampler.set_epoch(epoch)
        for keys in list(loader.batch_sampler)[id::num_workers]:
            yield loader.dataset.__getitems__(keys)


@pytest.mark.parametrize(("rank", "num_ranks", "id", "num_workers"), [(0, 1, 0, 1), (0, 1, 1, 2), (1, 2, 2, 3)])
def test_reads_go_forwards_and_each_sample_is_read_once(monkeypatch, folder, rank, num_ranks, id, num_workers):
    monkeypatch.setattr(reader_module, "get_worker_info", lambda: Worker(id, num_workers))
    dataset = train_set(folder)
    loader = train_loader(dataset, rank=rank, num_ranks=num_ranks, drop_last=False)
    jumps = []
    reader = loader.dataset.reader
    original = reader._share_from
    monkeypatch.setattr(reader, "_share_from", lambda key: (jumps.append(key), original(key))[1])
    reads = Reads(monkeypatch, dataset)
    used = [i for batch in batches_of_worker(loader, id, num_workers, range(3)) for i in batch.indices.tolist()]
    assert len(jumps) == 1, "after the start every window was foreseen"
    # Of the fourth epoch the first window may have been read, which has up to 18 samples.
    assert len(used) <= len(reads.places) <= len(used) + 18
    order, position = loader.dataset.reader.order, 0
    for epoch in range(3):
        for number in range(order.num_windows):
            own = sorted(set(order.window(epoch, number).samples.tolist()) & set(used_in(used, epoch, loader, id)))
            places = [(int(dataset.records[i]["shard"]), int(dataset.records[i]["offset"])) for i in own]
            assert places == sorted(places) == reads.places[position : position + len(own)]
            position += len(own)
    assert position == len(used)


def used_in(used: list[int], epoch: int, loader: DataLoader, id: int) -> list[int]:
    """Those of three epochs' samples that were used in one epoch."""
    loader.batch_sampler.set_epoch(epoch)
    workers = reader_module.get_worker_info().num_workers
    return [key.sample for keys in list(loader.batch_sampler)[id::workers] for key in keys]


@pytest.mark.parametrize(("num_ranks", "num_workers"), [(1, 1), (2, 2)])
def test_memory_is_about_one_window_over_ranks_and_workers(monkeypatch, tmp_path, num_ranks, num_workers):
    folder = make_shards(tmp_path, train=(80,) * 8)
    monkeypatch.setattr(reader_module, "get_worker_info", lambda: Worker(0, num_workers))
    loader = train_loader(train_set(folder), num_ranks=num_ranks)
    reader = loader.dataset.reader
    most = 0
    for _ in batches_of_worker(loader, 0, num_workers, range(2)):
        shares = (reader._current, reader._next)
        most = max(most, sum(len(content) for share in shares for content in share._held.values()))
    order = WindowedOrder(train_set(folder).layout, 2, 0)
    bound = bytes_held(order, num_ranks, num_workers)
    assert bound == 2 * max(order.layout.sizes[:2]) / (num_ranks * num_workers)
    assert 0.3 * bound < most < 1.1 * bound  # tars of so small photos are half padding


def test_one_file_is_open_at_a_time(folder):
    def open_shards():
        links = [os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")]  # noqa: PTH208
        return Counter(link for link in links if link.startswith(str(folder)))

    loader = train_loader(train_set(folder))
    for _ in loader:
        assert sum(open_shards().values()) <= 1


def test_an_open_data_set_travels_to_another_process(folder):
    loader = train_loader(train_set(folder), drop_last=False, place=(1, 0))
    keys = next(iter(loader.batch_sampler))
    first = digest_of([loader.dataset.__getitems__(keys)])
    copy = pickle.loads(pickle.dumps(loader.dataset.dataset))
    assert copy._file is None and copy.encoded(keys[0].sample) == loader.dataset.dataset.encoded(keys[0].sample)
    assert first == digests(folder, 1, 0)[0]


def test_what_was_not_foreseen_is_read_all_the_same(folder, expected):
    loader = train_loader(train_set(folder), drop_last=False, place=(1, 0))
    batches = list(loader.batch_sampler)
    for number in [*np.random.default_rng(0).permutation(len(batches)), 2, 2]:
        assert digest_of([loader.dataset.__getitems__(batches[number])]) == expected[number]
    assert len(batches[0]) == GLOBAL_BATCH_SIZE
