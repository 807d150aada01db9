"""Which samples make up which batch, on any number of ranks.

The order of the samples of an epoch is a function of (seed, epoch). It is cut into global batches, and each
global batch into one contiguous slice for each rank: with the same seed and global batch size, batch k holds
the same samples on 1 rank and on 1024.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from torch.utils.data import Sampler

from syncbn.data.loading.order import EpochOrder, ShuffledOrder


class SampleKey(NamedTuple):
    """Names a sample and the state of its augmentation; what a batch sampler hands to a data set."""

    epoch: int
    sample: int


def split_global_batch(global_batch_size: int, num_ranks: int, accumulate_grad_batches: int = 1) -> int:
    """Images that one rank processes at a time.

    Args:
        global_batch_size: Images of one optimiser step, over all ranks.
        num_ranks: Processes that train together.
        accumulate_grad_batches: Forward and backward passes of one optimiser step.

    Returns:
        ``global_batch_size / (num_ranks * accumulate_grad_batches)``.

    Raises:
        ValueError: It does not divide; the message names the nearest sizes that do.
    """
    _check_batch_size(global_batch_size)
    parts = num_ranks * accumulate_grad_batches
    per_rank, remainder = divmod(global_batch_size, parts)
    if remainder:
        fitting = [str(size) for size in (per_rank * parts, (per_rank + 1) * parts) if size]
        accumulated = f" x {accumulate_grad_batches} accumulated batches" if accumulate_grad_batches > 1 else ""
        raise ValueError(
            f"global_batch_size={global_batch_size} cannot be divided among {num_ranks} ranks{accumulated}:"
            f" it must be a multiple of {parts}; nearest: {' or '.join(fitting)}"
        )
    return per_rank


def _check_batch_size(global_batch_size: int) -> None:
    if global_batch_size < 1:
        raise ValueError(f"global_batch_size={global_batch_size} must be at least 1")


def part_of_range(start: int, size: int, part: int, parts: int) -> tuple[int, int]:
    """Where a part of the range start..start + size - 1 begins and ends; parts differ in size by at most one."""
    return start - (-size * part // parts), start - (-size * (part + 1) // parts)


def batches_per_epoch(num_samples: int, global_batch_size: int, drop_last: bool) -> int:
    """Global batches of an epoch; ``drop_last`` leaves out the last one where it is incomplete."""
    _check_batch_size(global_batch_size)
    return num_samples // global_batch_size if drop_last else -(-num_samples // global_batch_size)


def images_of_global_batch(number: int, num_samples: int, global_batch_size: int) -> int:
    """Images of a global batch of an epoch, counted from 0: fewer in the last one, where it is incomplete."""
    return min(global_batch_size, num_samples - number * global_batch_size)


class GlobalBatchSampler(Sampler[list[SampleKey]]):
    """One rank's share of the shuffled global batches of an epoch.

    With accumulation each global batch is cut into ``accumulate_grad_batches`` consecutive parts, and each of
    these among the ranks. Of an incomplete last global batch, if kept, the shares differ in size by at most one, and
    may be empty.

    Args:
        num_samples: Size of the training set.
        global_batch_size: Images of one optimiser step, over all ranks.
        rank: This process, in 0..num_ranks - 1.
        num_ranks: Processes that train together.
        accumulate_grad_batches: Forward and backward passes of one optimiser step.
        seed: Of the run; decides the order of the samples where ``order`` is None.
        drop_last: Whether to leave out the last global batch of an epoch where it is incomplete.
        order: Of the samples in each epoch; None shuffles all as one.
        repeat_first_epoch: Whether every epoch is the first one again, random changes of the images included.
        left_out: Samples that are left out of their batches, which are the smaller; all else stays where it was.

    Raises:
        ValueError: ``global_batch_size`` does not divide, or exceeds ``num_samples`` of which none would be left.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        accumulate_grad_batches: int = 1,
        seed: int = 0,
        drop_last: bool = True,
        order: EpochOrder | None = None,
        repeat_first_epoch: bool = False,
        left_out: Collection[int] = frozenset(),
    ) -> None:
        self.per_rank = split_global_batch(global_batch_size, num_ranks, accumulate_grad_batches)
        if drop_last and global_batch_size > num_samples:
            raise ValueError(
                f"global_batch_size={global_batch_size} exceeds the {num_samples} training images:"
                " at most that many fit, or drop_last=false keeps a smaller batch"
            )
        self.order: EpochOrder = ShuffledOrder(num_samples, seed) if order is None else order
        assert self.order.num_samples == num_samples
        self.num_samples = num_samples
        self.global_batch_size = global_batch_size
        self.rank = rank
        self.num_ranks = num_ranks
        self.accumulate_grad_batches = accumulate_grad_batches
        self.repeat_first_epoch = repeat_first_epoch
        self.left_out = left_out
        self.epoch = 0
        self.first_batch = 0
        self._batches = batches_per_epoch(num_samples, global_batch_size, drop_last) * accumulate_grad_batches

    @property
    def sampler(self) -> "GlobalBatchSampler":
        """Itself: Lightning calls ``dataloader.batch_sampler.sampler.set_epoch``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; a place within the present one is kept."""
        if epoch != self.epoch:
            self.set_position(epoch, 0)

    def set_position(self, epoch: int, first_batch: int) -> None:
        """Go to a batch of an epoch, at no cost: the next iteration starts there and ends with the epoch."""
        self.epoch = epoch
        self.first_batch = first_batch

    def __len__(self) -> int:
        """Batches of a whole epoch, wherever the next iteration starts."""
        return self._batches

    def share(self, batch: int) -> tuple[int, int]:
        """The positions of the epoch that this rank processes in a batch: the first, and the one after the last."""
        number, accumulated = divmod(batch, self.accumulate_grad_batches)
        size = images_of_global_batch(number, self.num_samples, self.global_batch_size)
        part = accumulated * self.num_ranks + self.rank
        parts = self.num_ranks * self.accumulate_grad_batches
        return part_of_range(number * self.global_batch_size, size, part, parts)

    def batch_with(self, position: int) -> int:
        """The batch, from 0, in which some rank processes a position of the epoch; `share` the other way round."""
        number, offset = divmod(position, self.global_batch_size)
        size = images_of_global_batch(number, self.num_samples, self.global_batch_size)
        part = offset * self.num_ranks * self.accumulate_grad_batches // size
        return number * self.accumulate_grad_batches + part // self.num_ranks

    def __iter__(self) -> Iterator[list[SampleKey]]:
        epoch = 0 if self.repeat_first_epoch else self.epoch
        for batch in range(self.first_batch, self._batches):
            samples = map(int, self.order.samples(epoch, *self.share(batch)))
            yield [SampleKey(epoch, sample) for sample in samples if sample not in self.left_out]


class EvaluationBatchSampler(Sampler[list[SampleKey]]):
    """One rank's share of all samples in order, each exactly once over the ranks.

    No sample is repeated to fill up a batch: shares differ in size by one where the samples do not divide,
    and a rank's share may be empty (never that of rank 0). All ranks see the same number of batches.

    Args:
        num_samples: Size of the data set.
        global_batch_size: Images that the ranks together process at a time.
        rank: This process, in 0..num_ranks - 1.
        num_ranks: Processes that evaluate together.
        left_out: Samples of the data set that are not evaluated.
    """

    def __init__(
        self,
        num_samples: int,
        global_batch_size: int,
        *,
        rank: int = 0,
        num_ranks: int = 1,
        left_out: Collection[int] = frozenset(),
    ) -> None:
        samples: Sequence[int] = range(num_samples)
        self.samples = [sample for sample in samples if sample not in left_out] if left_out else samples
        self.global_batch_size = global_batch_size
        self.rank = rank
        self.num_ranks = num_ranks

    def __len__(self) -> int:
        return -(-len(self.samples) // self.global_batch_size)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for start in range(0, len(self.samples), self.global_batch_size):
            size = min(self.global_batch_size, len(self.samples) - start)
            first, last = part_of_range(start, size, self.rank, self.num_ranks)
            yield [SampleKey(0, sample) for sample in self.samples[first:last]]
