"""Batch arithmetic, the schedule and the parameter groups."""

import pytest
from torch import nn

from syncbn import SyncBatchNorm
from syncbn.training import BatchArithmetic
from syncbn.training.optimization.parameter_groups import parameter_groups
from syncbn.training.optimization.schedules import exponential_schedule


def test_everything_follows_from_the_global_batch():
    arithmetic = BatchArithmetic(128, 2, 4, 0.045, normalization_batch_size=16)
    assert (arithmetic.images_per_rank, arithmetic.ranks_per_normalization) == (16, 1)
    assert arithmetic.learning_rate == pytest.approx(0.18)
    assert "global batch 128 = 2 ranks x 4 passes x 16 images" in arithmetic.describe()
    assert "0.045 per 32 images -> 0.18 per 128" in arithmetic.describe()


def test_the_learning_rate_does_not_depend_on_the_ranks():
    rates = {BatchArithmetic(256, ranks, 1, 0.045).learning_rate for ranks in (1, 2, 64, 256)}
    assert len(rates) == 1


@pytest.mark.parametrize("size", [0, 8, 24, 48, 100])
def test_a_normalisation_batch_of_no_whole_ranks_is_refused(size):
    with pytest.raises(ValueError, match=rf"normalization_batch_size={size} .* what fits: 16, 32, 64$"):
        BatchArithmetic(64, 4, 1, 0.045, normalization_batch_size=size)


def test_an_indivisible_global_batch_is_refused():
    with pytest.raises(ValueError, match=r"global_batch_size=30 .* nearest: 28 or 32"):
        BatchArithmetic(30, 4, 1, 0.045)


@pytest.mark.parametrize("staircase", [False, True])
def test_the_schedule_decays_by_its_factor_in_its_time(staircase):
    factor = exponential_schedule(0.96, 1000, staircase=staircase)
    assert [factor(1000 * times) for times in range(4)] == pytest.approx([0.96**times for times in range(4)])
    assert factor(1500) == pytest.approx(0.96 if staircase else 0.96**1.5)


def test_the_warm_up_rises_from_nothing():
    factor = exponential_schedule(1.0, 1000, warmup=200)
    assert [factor(images) for images in (0, 50, 200, 900)] == pytest.approx([0, 0.25, 1, 1])


@pytest.mark.parametrize("arguments", [(0, 10), (1.1, 10), (0.9, 0), (0.9, -1)])
def test_schedules_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match="decay_"):
        exponential_schedule(*arguments)


def test_only_weights_decay_and_each_parameter_is_in_one_group():
    shared = nn.Linear(4, 4)
    network = nn.Sequential(nn.Conv2d(1, 4, 3), SyncBatchNorm(4), nn.BatchNorm2d(4), shared, shared, nn.LayerNorm(4))
    network[0].bias.requires_grad_(False)
    groups = {group["name"]: group for group in parameter_groups(network, 0.1, bias_weight_decay=0.01)}
    assert {name: group["weight_decay"] for name, group in groups.items()} == {
        "weights": 0.1,
        "norms": 0.0,
        "biases": 0.01,
    }
    assert {name: len(group["params"]) for name, group in groups.items()} == {"weights": 2, "norms": 6, "biases": 1}
