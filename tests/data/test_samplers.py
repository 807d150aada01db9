"""The same global batches on any number of ranks."""

from itertools import pairwise

import numpy as np
import pytest

from syncbn.data import EvaluationBatchSampler, GlobalBatchSampler, split_global_batch
from syncbn.data.loading.order import epoch_order


def global_batches(num_ranks: int, *, epoch: int, accumulate: int = 1, seed: int = 3) -> list[list[tuple[int, int]]]:
    """What all ranks together see: 53 samples in global batches of 8, put together over ranks and passes."""
    ranks = []
    for rank in range(num_ranks):
        sampler = GlobalBatchSampler(
            53, 8, rank=rank, num_ranks=num_ranks, accumulate_grad_batches=accumulate, seed=seed
        )
        sampler.set_epoch(epoch)
        ranks.append(list(sampler))
    passes = [[key for rank in ranks for key in rank[batch]] for batch in range(len(ranks[0]))]
    starts = range(0, len(passes), accumulate)
    return [[key for batch in passes[start : start + accumulate] for key in batch] for start in starts]


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_a_global_batch_does_not_depend_on_ranks_or_accumulation(num_ranks, accumulate):
    for epoch in (0, 5):
        expected = global_batches(1, epoch=epoch)
        assert global_batches(num_ranks, epoch=epoch, accumulate=accumulate) == expected
        assert len(expected) == 6  # 53 // 8: the last 5 samples are dropped


def test_an_epoch_has_each_sample_once_and_an_order_of_its_own():
    orders = [epoch_order(50, seed, epoch).tolist() for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len({tuple(order) for order in orders}) == 4
    assert orders[0] == epoch_order(50, 0, 0).tolist()


def test_it_resumes_at_a_batch_without_replay_and_goes_on_to_the_next_epoch():
    whole = GlobalBatchSampler(53, 8, rank=1, num_ranks=2)
    whole.set_epoch(4)
    expected = list(whole)
    resumed = GlobalBatchSampler(53, 8, rank=1, num_ranks=2)
    resumed.set_position(4, 2)
    resumed.set_epoch(4)  # as Lightning calls it before the epoch goes on
    assert list(resumed) == expected[2:] and len(resumed) == len(expected)
    for sampler in (whole, resumed):
        sampler.set_epoch(5)
    assert list(resumed) == list(whole)


def test_the_first_epoch_can_be_every_epoch():
    """As trainer.overfit_batches asks: the same samples with the same random changes, which follow from the key."""
    sampler = GlobalBatchSampler(53, 8, rank=1, num_ranks=2, repeat_first_epoch=True)
    first = list(sampler)
    sampler.set_epoch(3)
    assert list(sampler) == first
    sampler.set_position(4, 2)
    assert list(sampler) == first[2:]


@pytest.mark.parametrize(
    ("size", "ranks", "accumulate", "message"),
    [
        (
            10,
            4,
            1,
            "global_batch_size=10 cannot be divided among 4 ranks: .* multiple of 4; nearest: 8 or 12",
        ),
        (3, 4, 1, "nearest: 4$"),
        (20, 2, 4, "among 2 ranks x 4 accumulated batches: .* multiple of 8; nearest: 16 or 24"),
        (0, 1, 1, "global_batch_size=0 must be at least 1"),
        (-4, 2, 1, "global_batch_size=-4 must be at least 1"),
    ],
)
def test_a_batch_that_does_not_divide_is_refused_with_sizes_that_do(size, ranks, accumulate, message):
    with pytest.raises(ValueError, match=message):
        split_global_batch(size, ranks, accumulate)


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match="global_batch_size=54 exceeds the 53 training images"):
        GlobalBatchSampler(53, 54)


@pytest.mark.parametrize("samples", [1, 3, 16, 17, 53])
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_evaluation_has_every_sample_once(num_ranks, samples):
    ranks = [list(EvaluationBatchSampler(samples, 16, rank=rank, num_ranks=num_ranks)) for rank in range(num_ranks)]
    seen = [key.sample for rank in ranks for batch in rank for key in batch]
    assert sorted(seen) == list(range(samples))
    assert len({len(rank) for rank in ranks}) == 1, "all ranks must see the same number of batches"
    for shares in zip(*ranks, strict=True):
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1 and sizes[0] >= 1
        together = [key.sample for share in shares for key in share]
        assert all(after == before + 1 for before, after in pairwise(together))


def test_keys_are_plain_integers():
    sampler = GlobalBatchSampler(9, 3)
    assert all(type(value) is int for batch in sampler for key in batch for value in key)
    assert np.ndim(next(iter(sampler))) == 2
