"""The order in which an epoch visits the samples: a function of (seed, epoch), known at any position without replay.

Source of the windows: section 4.2 of the paper shuffles "within-shard", which keeps reads sequential. Here the shards
are shuffled, consecutive ones form windows, and the samples of a window are shuffled among all its shards.
"""

from typing import NamedTuple, Protocol

import numpy as np

from syncbn.data.datasets.base import ShardLayout
from syncbn.random_streams import ORDER_STREAM, random_stream


class EpochOrder(Protocol):
    """A permutation of the samples for every epoch."""

    @property
    def num_samples(self) -> int:
        """How many samples an epoch has."""
        ...

    def samples(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """The samples at the positions start..stop - 1 of an epoch: int64, shape (stop - start,)."""
        ...


def epoch_order(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Order of the samples in an epoch: a permutation, and a function of the arguments alone."""
    return random_stream(seed, epoch, 0, ORDER_STREAM).permutation(num_samples)


class ShuffledOrder:
    """All samples shuffled as one, for data in which every sample is as near as any other.

    Args:
        num_samples: How many samples an epoch has.
        seed: Of the run.
    """

    def __init__(self, num_samples: int, seed: int) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self._epoch = -1
        self._order = np.empty(0, np.int64)

    def samples(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """The samples at the positions start..stop - 1 of an epoch: int64, shape (stop - start,)."""
        if epoch != self._epoch:
            self._epoch, self._order = epoch, epoch_order(self.num_samples, self.seed, epoch)
        return self._order[start:stop]


class ShardWindow(NamedTuple):
    """Some shards whose samples are shuffled together.

    Attributes:
        start: Position of its first sample in the epoch.
        samples: In the order of the epoch: int64, shape (N,).
    """

    start: int
    samples: np.ndarray

    @property
    def stop(self) -> int:
        """The position after its last sample."""
        return self.start + len(self.samples)


class WindowedOrder:
    """Shards shuffled, and samples shuffled among the shards of a window.

    A position costs the shuffling of the shards and of one window, wherever it lies in the epoch.

    Args:
        layout: Which samples lie in which shard.
        shuffle_window: Shards of a window; the last window of an epoch may have fewer. 0 for windows of one shard
            whose samples are not shuffled: what the paper compares with, to measure what shuffling brings.
        seed: Of the run.

    Raises:
        ValueError: ``shuffle_window`` is negative.
    """

    def __init__(self, layout: ShardLayout, shuffle_window: int, seed: int) -> None:
        if shuffle_window < 0:
            raise ValueError(f"shuffle_window={shuffle_window} must not be negative: it counts shards")
        self.layout = layout
        self.shuffles_samples = shuffle_window > 0
        shuffle_window = max(1, shuffle_window)
        self.shuffle_window = shuffle_window
        self.seed = seed
        self.num_samples = int(layout.starts[-1])
        self.num_windows = -(-layout.num_shards // shuffle_window)
        self._epoch = -1
        self._shards = np.empty(0, np.int64)
        self._starts = np.empty(0, np.int64)
        self._window_key = (-1, -1)
        self._window = ShardWindow(0, np.empty(0, np.int64))

    def _enter(self, epoch: int) -> None:
        """Shuffle the shards for an epoch, and note where its windows start."""
        if epoch == self._epoch:
            return
        self._epoch = epoch
        self._shards = epoch_order(self.layout.num_shards, self.seed, epoch)
        ends = np.cumsum(np.diff(self.layout.starts)[self._shards])
        self._starts = np.append(0, ends)[:: self.shuffle_window][: self.num_windows]

    def window(self, epoch: int, number: int) -> ShardWindow:
        """A window of an epoch, counted from 0."""
        if (epoch, number) == self._window_key:
            return self._window
        self._enter(epoch)
        shards = self._shards[number * self.shuffle_window :][: self.shuffle_window]
        starts = self.layout.starts
        samples = np.concatenate([np.arange(starts[shard], starts[shard + 1]) for shard in shards])
        if self.shuffles_samples:
            # Stream 0 of the epoch has shuffled the shards.
            samples = random_stream(self.seed, epoch, number + 1, ORDER_STREAM).permutation(samples)
        self._window_key, self._window = (epoch, number), ShardWindow(int(self._starts[number]), samples)
        return self._window

    def window_at(self, epoch: int, position: int) -> int:
        """The number of the window that a position of an epoch lies in."""
        self._enter(epoch)
        return int(np.searchsorted(self._starts, position, side="right")) - 1

    def window_with(self, epoch: int, sample: int) -> int:
        """The number of the window that holds a sample in an epoch."""
        self._enter(epoch)
        shard = np.searchsorted(self.layout.starts, sample, side="right") - 1
        return int(np.flatnonzero(self._shards == shard)[0]) // self.shuffle_window

    def samples(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """The samples at the positions start..stop - 1 of an epoch: int64, shape (stop - start,)."""
        parts = [np.empty(0, np.int64)]
        while start < stop:
            window = self.window(epoch, self.window_at(epoch, start))
            parts.append(window.samples[start - window.start : stop - window.start])
            start += len(parts[-1])
        return np.concatenate(parts)
