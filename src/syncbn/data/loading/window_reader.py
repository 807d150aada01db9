"""Reads what one process needs of a window of shards, in file order and ahead of need.

Samples of a window are used in random order, but a network file system wants forward reads. A process knows by
arithmetic which samples of the window will be its own: its rank's share of each batch, and of these batches the ones
that the DataLoader deals to it in turn. It reads them in the order of the files and holds their compressed bytes until
they are used. While it uses one window it reads the next at the same pace, and so holds about one window's share:

    bytes of a window / (ranks x workers of a rank)

or, where that is less, the images of one batch. At the start, and on resuming, it reads its first share at once. What
is read ahead decides speed only: a sample that was not foreseen is read all the same.
"""

from itertools import chain

import numpy as np
from torch.utils.data import get_worker_info

from syncbn.data.datasets.base import ImageDataset, ReadError
from syncbn.data.loading.order import WindowedOrder
from syncbn.data.loading.samplers import GlobalBatchSampler, SampleKey


class _Share:
    """The samples of one window that one process uses.

    Args:
        dataset: Where to read them.
        epoch: That the window belongs to.
        number: Of the window, in its epoch.
        turn: The batches of this process are those whose number leaves this remainder.
        samples: Numbers of the samples, int64, shape (N,).
    """

    def __init__(self, dataset: ImageDataset, epoch: int, number: int, turn: int, samples: np.ndarray) -> None:
        self.dataset = dataset
        self.epoch = epoch
        self.number = number
        self.turn = turn
        self.samples = np.sort(samples)  # samples are numbered in the order of the files
        self.num_read = 0
        self._held: dict[int, bytes | ReadError] = {}

    def __contains__(self, key: SampleKey) -> bool:
        place = np.searchsorted(self.samples, key.sample)
        return key.epoch == self.epoch and bool(place < len(self.samples) and self.samples[place] == key.sample)

    def holds(self, key: SampleKey) -> bool:
        """Whether the sample has been read and not yet been used."""
        return key.epoch == self.epoch and key.sample in self._held

    @property
    def used(self) -> float:
        """The part of the samples that has been used, in 0..1."""
        return (self.num_read - len(self._held)) / max(1, len(self.samples))

    def read(self, part: float) -> None:
        """Read on until this part of the samples has been read, in 0..1."""
        target = int(np.ceil(part * len(self.samples)))
        for sample in self.samples[self.num_read : target].tolist():
            try:
                content = self.dataset.encoded(sample)
                assert content is not None, "data in shards are encoded"
                self._held[sample] = content
            except ReadError as error:  # concerns only whoever asks for this sample
                self._held[sample] = error
        self.num_read = max(self.num_read, target)

    def take(self, sample: int) -> bytes:
        """The bytes of a sample, which are then forgotten.

        Raises:
            ReadError: It could not be read.
        """
        content = self._held.pop(sample)
        if isinstance(content, ReadError):
            raise content
        return content


class WindowReader:
    """Gives the encoded images that the batches of one process need.

    Args:
        dataset: Training images in shards.
        sampler: Of this rank's batches.
        order: Of the samples, which the sampler follows.
    """

    def __init__(self, dataset: ImageDataset, sampler: GlobalBatchSampler, order: WindowedOrder) -> None:
        self.dataset = dataset
        self.sampler = sampler
        self.order = order
        self._current: _Share | None = None
        self._next: _Share | None = None

    def encoded(self, key: SampleKey) -> bytes:
        """The file of the image that a key names.

        Raises:
            ReadError: It cannot be read; the message names it.
        """
        if self._current is None or not self._current.holds(key):
            self._advance_to(key)
        assert self._current is not None and self._next is not None
        try:
            return self._current.take(key.sample)
        finally:
            self._next.read(self._current.used)

    def _advance_to(self, key: SampleKey) -> None:
        """Make the window of a key the current one: the next as a rule, any other at the start or on resuming."""
        foreseen = self._next is not None and key in self._next
        self._current = self._next if foreseen else self._share_from(key)
        assert self._current is not None
        self._current.read(1.0)
        self._next = self._share_after(self._current)

    def _share_from(self, key: SampleKey) -> _Share:
        """What this process needs of the window of a key from this key on."""
        number = self.order.window_with(key.epoch, key.sample)
        window = self.order.window(key.epoch, number)
        position = window.start + int(np.flatnonzero(window.samples == key.sample)[0])
        turn = self.sampler.batch_with(position) % self._num_workers()
        return self._share(key.epoch, number, turn, position)

    def _share_after(self, share: _Share) -> _Share:
        """What this process needs of the next window of which it needs anything, maybe in the next epoch."""
        worker = get_worker_info()
        first_turn = 0 if worker is None else worker.id  # a DataLoader deals the first batch of an epoch to worker 0
        following = chain(
            ((share.epoch, number, share.turn) for number in range(share.number + 1, self.order.num_windows)),
            ((share.epoch + 1, number, first_turn) for number in range(self.order.num_windows)),
        )
        for epoch, number, turn in following:
            found = self._share(epoch, number, turn)
            if len(found.samples):
                break
        return found

    def _share(self, epoch: int, number: int, turn: int, first_position: int = 0) -> _Share:
        window = self.order.window(epoch, number)
        last_batch = len(self.sampler) - 1
        samples = [np.empty(0, np.int64)]
        if len(window.samples):
            batches = range(self.sampler.batch_with(window.start), self.sampler.batch_with(window.stop - 1) + 1)
            for batch in batches:
                if batch % self._num_workers() != turn or batch > last_batch:
                    continue
                first, stop = self.sampler.share(batch)
                first = max(first, window.start, first_position)
                samples.append(window.samples[first - window.start : max(first, stop) - window.start])
        return _Share(self.dataset, epoch, number, turn, np.concatenate(samples))

    @staticmethod
    def _num_workers() -> int:
        worker = get_worker_info()
        return 1 if worker is None else worker.num_workers


def bytes_held(order: WindowedOrder, num_ranks: int, num_workers: int) -> float:
    """Compressed bytes that each process of a `WindowReader` holds, of the largest window there can be.

    Args:
        order: Of the samples.
        num_ranks: Processes that train together.
        num_workers: Of each rank; 0 as one, since then the training process reads.
    """
    largest = np.sort(order.layout.sizes)[-order.shuffle_window :].sum()
    return float(largest) / (num_ranks * max(1, num_workers))
