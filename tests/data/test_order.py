"""The order of an epoch: windows of shards, and any place in it without replay."""

import numpy as np
import pytest

from shard_cases import TRAIN_SHARDS
from syncbn.data import GlobalBatchSampler, ShardLayout, ShuffledOrder, WindowedOrder
from syncbn.data.loading import order as order_module


def layout(sizes: tuple[int, ...]) -> ShardLayout:
    return ShardLayout(np.append(0, np.cumsum(sizes)), 1000 * np.array(sizes))


@pytest.mark.parametrize("sizes", [TRAIN_SHARDS, (1,), (7, 7), (0, 4, 0, 0, 3, 0)])
@pytest.mark.parametrize("window", [1, 2, 100])
def test_an_epoch_is_a_permutation_of_its_own(sizes, window):
    samples = sum(sizes)
    orders = [
        tuple(WindowedOrder(layout(sizes), window, seed).samples(epoch, 0, samples).tolist())
        for seed, epoch in ((0, 0), (0, 1), (1, 0), (1, 1))
    ]
    assert all(sorted(order) == list(range(samples)) for order in orders)
    if samples > 20:
        assert len(set(orders)) == 4


def test_a_window_mixes_its_shards_and_no_others():
    sizes = (50,) * 12
    order = WindowedOrder(layout(sizes), 4, seed=0)
    together = []
    for epoch in range(2):
        for number in range(order.num_windows):
            window = order.window(epoch, number)
            shards = window.samples // 50
            assert len(set(shards.tolist())) == 4
            assert len(set(shards[:20].tolist())) == 4, "samples are shuffled across the window, not shard by shard"
            assert (np.diff(window.samples[shards == shards[0]]) < 0).any(), "and within each shard"
            together.append(frozenset(shards.tolist()))
    assert len(set(together)) == 6, "another epoch puts other shards together"


def test_the_order_does_not_depend_on_what_was_asked_before():
    whole = WindowedOrder(layout(TRAIN_SHARDS), 2, seed=5)
    expected = {epoch: whole.samples(epoch, 0, 43) for epoch in range(3)}
    asked = WindowedOrder(layout(TRAIN_SHARDS), 2, seed=5)
    for epoch, start, stop in ((2, 30, 43), (0, 10, 11), (2, 0, 43), (1, 20, 20), (0, 0, 30)):
        assert np.array_equal(asked.samples(epoch, start, stop), expected[epoch][start:stop])


def test_every_sample_knows_its_window():
    order = WindowedOrder(layout(TRAIN_SHARDS), 2, seed=1)
    for number in range(order.num_windows):
        window = order.window(4, number)
        for place, sample in enumerate(window.samples.tolist()):
            assert order.window_with(4, sample) == order.window_at(4, window.start + place) == number


class CountingStream:
    """Counts the numbers that are shuffled."""

    shuffled = 0

    def __init__(self, *arguments):
        self.stream = original_stream(*arguments)

    def permutation(self, numbers):
        CountingStream.shuffled += numbers if isinstance(numbers, int) else len(numbers)
        return self.stream.permutation(numbers)


original_stream = order_module.random_stream


@pytest.mark.parametrize("batch", [0, 1, 5_000, 9_990])
def test_a_place_costs_one_window_wherever_it_is(monkeypatch, batch):
    monkeypatch.setattr(order_module, "random_stream", CountingStream)
    order = WindowedOrder(layout((100,) * 1000), 5, seed=0)
    sampler = GlobalBatchSampler(100_000, 10, order=order)
    sampler.set_position(7, batch)
    CountingStream.shuffled = 0
    assert len(next(iter(sampler))) == 10
    assert CountingStream.shuffled == 1000 + 5 * 100  # the shards, and the samples of one window


def test_a_window_of_fewer_shards_than_none_is_refused():
    with pytest.raises(ValueError, match="shuffle_window=-1 must not be negative"):
        WindowedOrder(layout((3, 3)), -1, seed=0)


def test_without_shuffling_within_shards_the_same_samples_stay_together():
    order = WindowedOrder(layout((10,) * 6), 0, seed=0)
    epochs = [order.samples(epoch, 0, 60).reshape(6, 10) for epoch in range(2)]
    shards = [frozenset(map(tuple, epoch.tolist())) for epoch in epochs]
    assert shards[0] == shards[1] == {tuple(range(first, first + 10)) for first in range(0, 60, 10)}
    assert not np.array_equal(*epochs), "the shards are shuffled all the same"


def test_all_samples_shuffled_as_one():
    order = ShuffledOrder(50, seed=0)
    first, second = order.samples(0, 0, 50), order.samples(1, 0, 50)
    assert sorted(first) == sorted(second) == list(range(50)) and not np.array_equal(first, second)
    assert np.array_equal(order.samples(0, 20, 30), first[20:30])
