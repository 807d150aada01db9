"""estimate_population_statistics: Algorithm 2 over mini-batches, across ranks, and the exact pooled estimator."""

import pytest
import torch
from norm_cases import buffer_bytes, relative
from torch import nn

import syncbn
from ranks import run_ranks
from syncbn import SyncBatchNorm, convert_sync_batchnorm, estimate_population_statistics


def batches(count=4, n=6, C=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n + i, C, 5, generator=generator).double() * (i + 1) + i for i in range(count)]


def paper(xs):
    """E[x] = E_B[mu_B]; Var[x] = m/(m-1) E_B[sigma_B^2]: the mean of the unbiased variances."""
    flat = [x.transpose(0, 1).flatten(1) for x in xs]
    return torch.stack([f.mean(1) for f in flat]).mean(0), torch.stack([f.var(1) for f in flat]).mean(0)


def pooled(xs):
    flat = torch.cat([x.transpose(0, 1).flatten(1) for x in xs], 1)
    return flat.mean(1), flat.var(1)


ESTIMATORS = pytest.mark.parametrize(("estimator", "truth"), [("paper", paper), ("pooled", pooled)])


@ESTIMATORS
@pytest.mark.parametrize("plain", [True, False])
def test_one_layer(estimator, truth, plain):
    layer = nn.BatchNorm1d(3).double() if plain else SyncBatchNorm(3).double()
    model = nn.Sequential(layer).train()
    parameters = [p.clone() for p in model.parameters()]
    found = estimate_population_statistics(model, batches(6), 4, estimator=estimator)
    assert found is model
    mean, var = truth(batches(4))
    assert relative(layer.running_mean, mean) < 1e-12
    assert relative(layer.running_var, var) < 1e-12
    assert all(torch.equal(a, b) for a, b in zip(parameters, model.parameters(), strict=True))
    assert type(model[0]) is (nn.BatchNorm1d if plain else SyncBatchNorm)


def test_the_papers_estimator_is_the_default():
    model = nn.Sequential(SyncBatchNorm(3).double())
    estimate_population_statistics(model, batches(), 4)
    assert relative(model[0].running_var, paper(batches())[1]) < 1e-12


def on_ranks(rank, estimator, sizes):
    """Mini-batches split over the ranks; some ranks empty in some."""
    model = nn.Sequential(SyncBatchNorm(3).double())
    mine = [x.split([*size, len(x) - sum(size)])[rank] for x, size in zip(batches(), sizes, strict=True)]
    estimate_population_statistics(model, mine, 4, estimator=estimator)
    mean, var = (paper if estimator == "paper" else pooled)(batches())
    return relative(model[0].running_mean, mean), relative(model[0].running_var, var), buffer_bytes(model)


@pytest.mark.parametrize("estimator", ["paper", "pooled"])
@pytest.mark.parametrize("sizes", [((3,),) * 4, ((6,), (2,), (0,), (9,)), ((1, 2), (0, 4), (3, 0), (2, 2))], ids=str)
def test_across_ranks(estimator, sizes):
    found = run_ranks(on_ranks, len(sizes[0]) + 1, estimator, sizes)
    for mean, var, buffers in found:
        assert max(mean, var) < 1e-12
        assert buffers == found[0][2]


def in_groups(rank, estimator):
    """Normalised in pairs: the mini-batches of all pairs count, and all ranks end with the same."""
    model = nn.Sequential(SyncBatchNorm(3, process_group=syncbn.new_group(2)).double())
    xs = batches(4)
    mine = [xs[2 * step + rank // 2][3 * (rank % 2) : 3 * (rank % 2) + 3] for step in range(2)]
    estimate_population_statistics(model, mine, 2, estimator=estimator)
    mean, var = (paper if estimator == "paper" else pooled)([x[:6] for x in xs])
    return relative(model[0].running_mean, mean), relative(model[0].running_var, var)


@pytest.mark.parametrize("estimator", ["paper", "pooled"])
def test_groups_of_ranks(estimator):
    for errors in run_ranks(in_groups, 4, estimator):
        assert max(errors) < 1e-12


def test_deeper_layers_see_inputs_normalised_by_the_mini_batch():
    """Not by the running statistics of before, which are what is being replaced."""
    torch.manual_seed(0)
    model = nn.Sequential(SyncBatchNorm(3), nn.Conv1d(3, 2, 1), SyncBatchNorm(2)).double()
    model[0].running_mean.fill_(100.0)
    with torch.no_grad():
        hidden = [model[1](nn.functional.batch_norm(x, None, None, training=True, eps=1e-5)) for x in batches()]
    estimate_population_statistics(model, batches(), 4)
    mean, var = paper(hidden)
    assert relative(model[2].running_mean, mean) < 1e-11
    assert relative(model[2].running_var, var) < 1e-11


class Recorder(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        self.seen.append((self.training, torch.is_grad_enabled(), len(x)))
        return x


@pytest.mark.parametrize("training", [True, False])
def test_flags_come_back_and_dropout_is_off(training):
    model = nn.Sequential(Recorder(), nn.Dropout(0.5), SyncBatchNorm(3), nn.Sequential(nn.Dropout(0.1))).double()
    model.train(training)
    model[3].train(not training)
    flags = [m.training for m in model.modules()]
    estimate_population_statistics(model, batches(), 3)
    assert [m.training for m in model.modules()] == flags
    assert model[0].seen == [(False, False, 6), (False, False, 7), (False, False, 8)]
    assert relative(model[2].running_mean, paper(batches(3))[0]) < 1e-12


def test_flags_come_back_after_an_error():
    class Failing(nn.Module):
        def forward(self, x):
            raise KeyError("the user's own error")

    model = nn.Sequential(nn.BatchNorm1d(3), Failing(), nn.Dropout()).double()
    with pytest.raises(KeyError):
        estimate_population_statistics(model, batches(), 2)
    assert all(m.training for m in model.modules())
    assert type(model[0]) is nn.BatchNorm1d
    assert set(model[0].__dict__) == set(nn.BatchNorm1d(3).__dict__)
    model[0](batches()[0])
    assert model[0].running_mean.abs().max() > 0  # an ordinary training step again


def test_afterwards_training_goes_on_as_before():
    model = nn.Sequential(SyncBatchNorm(3, momentum=0.5)).double()
    estimate_population_statistics(model, batches(), 4)
    before = model[0].running_mean.clone()
    x = batches(1, seed=1)[0]
    model(x).sum().backward()
    assert relative(model[0].running_mean, 0.5 * before + 0.5 * x.mean((0, 2))) < 1e-12


def test_frozen_layers_are_left_alone():
    model = nn.Sequential(SyncBatchNorm(3), SyncBatchNorm(3)).double().train()
    model[0].eval()
    model[0].running_mean.fill_(7.0)
    estimate_population_statistics(model, batches(), 4)
    assert model[0].running_mean.tolist() == [7.0] * 3
    assert model[1].running_mean.tolist() != [0.0] * 3


@pytest.mark.parametrize(
    "wrap", [lambda x: (x, 1), lambda x: [x, None], lambda x: {"image": x, "label": 0}, lambda x: ((x, 2), 3)]
)
def test_batches_as_data_loaders_give_them(wrap):
    model = nn.Sequential(SyncBatchNorm(3).double())
    estimate_population_statistics(model, (wrap(x) for x in batches()), 4)
    assert relative(model[0].running_mean, paper(batches())[0]) < 1e-12


def test_a_converted_model():
    model = convert_sync_batchnorm(nn.Sequential(nn.BatchNorm1d(3)).double())
    estimate_population_statistics(model, batches(), 4)
    assert relative(model[0].running_var, paper(batches())[1]) < 1e-12


def test_a_model_without_parameters():
    model = nn.Sequential(SyncBatchNorm(3, affine=False).double())
    estimate_population_statistics(model, batches(), 4)
    assert relative(model[0].running_mean, paper(batches())[0]) < 1e-12


def test_no_more_batches_are_taken_than_needed():
    taken = []

    def stream():
        for x in batches(6):
            taken.append(len(x))
            yield x

    estimate_population_statistics(nn.Sequential(SyncBatchNorm(3)).double(), stream(), 3)
    assert len(taken) == 3


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"estimator": "median"}, "paper.*pooled.*median"),
        ({"num_batches": 0}, "num_batches.*0"),
        ({"num_batches": 9}, "num_batches=9.*4"),
        ({"model": nn.Linear(3, 3)}, "BatchNorm"),
        ({"model": nn.Sequential(SyncBatchNorm(3, track_running_stats=False))}, "running"),
    ],
)
def test_bad_arguments(arguments, text):
    given = {"model": nn.Sequential(SyncBatchNorm(3)).double(), "batches": batches(), "num_batches": 4, **arguments}
    with pytest.raises(ValueError, match=text) as caught:
        estimate_population_statistics(**given)
    assert "\n" not in str(caught.value)


def too_few_on_one_rank(rank):
    model = nn.Sequential(SyncBatchNorm(3)).double()
    try:
        estimate_population_statistics(model, batches(4 - rank), 4)
    except ValueError as error:
        return str(error)
    return "no error"


def test_too_few_batches_on_one_rank_is_an_error_on_all():
    first, second = run_ranks(too_few_on_one_rank, 2)
    assert "num_batches=4" in first
    assert "num_batches=4" in second
