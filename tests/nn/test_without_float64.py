"""Devices without float64: no float64 tensor is made there, and results are as good as those of torch's layers."""

import copy

import pytest
import torch
from norm_cases import (
    Case,
    buffer_bytes,
    errors_of_step,
    make_layer,
    relative,
    set_parameters,
    step,
    stock_errors,
    whole_batch,
)
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import syncbn
from narrow_device import DEVICE, NarrowDevice, on_device
from ranks import run_ranks
from syncbn import SyncBatchNorm, sync_batch_norm_group
from syncbn.functional import compiled, exchange
from syncbn.functional.norm import Norm, Settings, Tensors
from syncbn.nn import PerActivationBatchNorm
from syncbn.ops import common, has_float64

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
OPTIONS = [{}, {"activation": "relu"}, {"residual": True, "activation": "relu"}]
MEANS = [{"mean": 0.3, "std": 1.7}, {"mean": 1000.0, "std": 3.0}]
ROUNDINGS = 2 * 2.0**-23  # two, of the largest value


class There(nn.Module):
    """A layer on the device, called with tensors of the host."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer.to(DEVICE)

    def forward(self, x, residual=None):
        return self.layer(x.to(DEVICE), None if residual is None else residual.to(DEVICE)).cpu()


def there(case, rank=0):
    """Errors of a step of the layer on the device, and the layer, back on the host."""
    batch, layer = whole_batch(case), make_layer(case)
    set_parameters(layer, batch)
    with NarrowDevice():
        stepped = step(case, There(layer), batch, rank)
        layer.cpu()
    return errors_of_step(case, layer, batch, *stepped, rank), layer


def assert_at_most_twice(found, theirs):
    too_large = {name: (mine, theirs[name]) for name, mine in found.items() if mine > 2 * theirs[name] + ROUNDINGS}
    assert too_large == {}


@pytest.mark.parametrize("values", MEANS, ids=lambda values: f"mean{values['mean']}")
@pytest.mark.parametrize("options", OPTIONS, ids=["", "relu", "residual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tail", "layout"), [((6,), "contiguous"), ((6, 9, 8), "contiguous"), ((6, 9, 8), "channels_last")]
)
def test_at_most_twice_the_error_of_torch(tail, layout, dtype, options, values):
    case = Case(tail, (8 if len(tail) > 1 else 64,), dtype, layout, layout, **options, **values)
    assert_at_most_twice(there(case)[0], stock_errors(case))


ON_RANKS = [
    Case((6, 5, 4), (5, 3), dtype, "channels_last", "contiguous", **options, **values)
    for dtype in (torch.float32, torch.bfloat16)
    for options in OPTIONS[1:]
    for values in MEANS
] + [Case((6, 5, 4), (0, 4)), Case((6,), (7, 3), momentum=None)]


def on_ranks(rank):
    """Of each case the errors here and the buffers; then what `other_paths` finds."""
    found = []
    for case in ON_RANKS:
        errors, layer = there(case, rank)
        found.append((errors, buffer_bytes(layer)))
    with NarrowDevice():
        return found, {path.__name__: path(rank) for path in OTHER_PATHS}


def all_empty(rank):
    """Statistics, outputs and gradients."""
    layer = SyncBatchNorm(3).to(DEVICE)
    x = on_device(torch.zeros(0, 3, 2), True)
    y = layer(x)
    y.sum().backward()
    return (
        y.shape == x.grad.shape == (0, 3, 2)
        and layer.num_batches_tracked.item() == 0
        and layer.running_var.sum().item() == 3
    )


HOST_FLOAT64, HOST, ON_DEVICE = (
    (torch.device("cpu"), torch.float64),
    (torch.device("cpu"), torch.float32),
    (DEVICE, torch.float32),
)


def batch_of(rank, where, n=5, requires_grad=False):
    x = 3 + torch.randn(n + rank, 4, 3, 2, generator=torch.Generator().manual_seed(rank))
    return x.to(where[1]).to(where[0]).requires_grad_(requires_grad)


def pair(where):
    """Two layers."""
    device, dtype = where
    return nn.ModuleList([SyncBatchNorm(4, activation="relu"), SyncBatchNorm(4)]).to(dtype).to(device)


def compared(run):
    """Errors against float64 of what `run` gives on the device, and of what it gives on the host in float32.

    Root mean squares over all tensors, since the largest error of so few elements is chance.
    """
    there, host, expected = run(ON_DEVICE), run(HOST), run(HOST_FLOAT64)
    errors = []
    for found in (there, host):
        pairs = [(a.detach().cpu().double(), b.detach().double()) for a, b in zip(found, expected, strict=True)]
        squares = [(a - b).square().mean() / b.square().mean().clamp(min=1e-6) for a, b in pairs]
        errors.append(torch.stack(squares).mean().sqrt().item())
    return tuple(errors)


def layers_in_one_message(rank):
    def run(where):
        layers, xs = pair(where), [batch_of(rank, where, n, requires_grad=True) for n in (5, 2)]
        loss = sum((y**3).sum() for y in sync_batch_norm_group(list(layers), xs))
        loss.backward()
        return [x.grad for x in xs] + [p.grad for p in layers.parameters()] + [layers[0].running_var]

    return compared(run)


def second_derivatives(rank):
    def run(where):
        layers, x = pair(where), batch_of(rank, where, requires_grad=True)
        (g,) = torch.autograd.grad((layers[1](layers[0](x)) ** 3).mean(), x, create_graph=True)
        g.square().sum().backward()
        return [x.grad, *(p.grad for p in layers.parameters())]

    return compared(run)


def checkpointed(rank):
    def run(where):
        found = []
        for reentrant in (True, False):
            layers, x = pair(where), batch_of(rank, where, requires_grad=True)
            for _ in range(2):
                (checkpoint(lambda x, m=layers: m[1](m[0](x)), x, use_reentrant=reentrant) ** 3).mean().backward()
            found += [x.grad, *layers.buffers()]
        return found

    return compared(run)


def statistics_of_a_population(rank):
    def run(where):
        found = []
        for estimator in ("paper", "pooled"):
            model = nn.Sequential(*pair(where))
            batches = [batch_of(rank, where, n) for n in (3, 6)]
            syncbn.estimate_population_statistics(model, batches, 2, estimator)
            found += [b for b in model.buffers() if b.is_floating_point()]
        return found

    return compared(run)


def compiled_parts(rank):
    """What torch.compile traces, run as it is; messages are not read by the host there."""
    exchange.may_be_read, before = (lambda numbers: False), exchange.may_be_read

    def run(where):
        layers, x = pair(where), batch_of(rank, where, requires_grad=True)
        residual = batch_of(rank, where).flip(0)
        route = syncbn.nn.sync_batch_norm._route(list(layers)) if torch.distributed.is_initialized() else None
        started = compiled.CompiledStarted([x, x], route)
        norms = [
            Norm(Tensors(x, m.weight, m.bias, r), Settings(m.eps, m.activation, m._running()))
            for m, r in zip(layers, (residual, None), strict=True)
        ]
        outputs, _ = started.finish(norms)
        sum((y**3).mean() for y in outputs).backward()
        return [*outputs, x.grad, *(p.grad for p in layers.parameters()), *layers.buffers()]

    try:
        return compared(run)
    finally:
        exchange.may_be_read = before


def a_group_without_a_backend_for_the_host(rank):
    """Messages have a communicator of their own; where they may not, the layer says what is missing."""
    group = torch.distributed.new_group(backend="cuda:gloo")
    layer = SyncBatchNorm(4, process_group=group).to(DEVICE)
    layer(batch_of(rank, ON_DEVICE))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SYNCBN_SHARE_COMMUNICATOR", "1")
        other = torch.distributed.new_group(backend="cuda:gloo")
        layer = SyncBatchNorm(4, process_group=other).to(DEVICE)
        with pytest.raises(
            ValueError, match=r"cuda:gloo, sums nothing on cpu.*without float64.*SYNCBN_SHARE_COMMUNICATOR unset"
        ):
            layer(batch_of(rank, ON_DEVICE))
    return True


def in_eval_mode(rank):
    def run(where):
        layers, x = pair(where).eval(), batch_of(rank, where, requires_grad=True)
        layers[0].running_mean.fill_(2.5)
        y = layers[1](layers[0](x, x.flip(0)))
        (y**3).mean().backward()
        return [y, x.grad, *(p.grad for p in layers.parameters())]

    return compared(run)


def per_activation(rank):
    def run(where):
        layer = PerActivationBatchNorm((4, 3, 2), activation="relu").to(where[1]).to(where[0])
        x = batch_of(rank, where, requires_grad=True)
        y = layer(x)
        (y**3).mean().backward()
        return [y, x.grad, layer.weight.grad, *layer.buffers()]

    return compared(run)


def made_again_in_the_backward(rank):
    def run(where):
        layers, x = pair(where), batch_of(rank, where, requires_grad=True)
        with syncbn.recompute_activations():
            y = layers[1](layers[0](x) ** 2)
        (y**3).mean().backward()
        return [y, x.grad, *(p.grad for p in layers.parameters())]

    return compared(run)


def converted_network(rank):
    """Of torch's layers and a residual network's parts; converted there, trained there, folded there."""

    def run(where):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3), nn.BatchNorm1d(3)
        )
        model = syncbn.convert_sync_batchnorm(model.to(where[1]).to(where[0]))
        x = batch_of(rank, where, requires_grad=True)
        (model(x) ** 3).mean().backward()
        reverted = syncbn.revert_sync_batchnorm(copy.deepcopy(model)).eval()
        folded = syncbn.fold_batch_norm(model)
        assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.modules())
        return [x.grad, reverted(x), folded(x), model.eval()(x), *(b for b in model.buffers())]

    return compared(run)


COMPARED = [
    layers_in_one_message,
    second_derivatives,
    checkpointed,
    statistics_of_a_population,
    compiled_parts,
    in_eval_mode,
    per_activation,
    made_again_in_the_backward,
    converted_network,
]
OTHER_PATHS = [*COMPARED, all_empty, a_group_without_a_backend_for_the_host]


@pytest.fixture(scope="module")
def world():
    return run_ranks(on_ranks, 2, timeout=120)


@pytest.mark.parametrize("i", range(len(ON_RANKS)))
def test_over_ranks(world, i):
    theirs = stock_errors(ON_RANKS[i])
    for found, _ in world:
        assert_at_most_twice(found[i][0], theirs)
    assert world[0][0][i][1] == world[1][0][i][1], "running statistics differ between ranks"


@pytest.mark.parametrize("path", OTHER_PATHS, ids=lambda path: path.__name__)
def test_other_paths_over_ranks(world, path):
    for _, found in world:
        result = found[path.__name__]
        assert result is True or result[0] <= 2 * result[1] + ROUNDINGS, result


@pytest.mark.parametrize("path", COMPARED, ids=lambda path: path.__name__)
def test_other_paths_alone(path):
    with NarrowDevice():
        there, host = path(0)
    assert there <= 2 * host + ROUNDINGS


def test_where_float64_is(monkeypatch):
    assert [has_float64(torch.device(name)) for name in ("cpu", "cuda:1", "mps", "mps:0")] == [True, True, False, False]
    assert not has_float64(torch.device("hpu")), "what is not there cannot be asked, which is no error"
    assert common._computes_in_float64(torch.device("cpu"))
    with NarrowDevice(), FakeTensorMode():  # which does not see the question
        assert common._computes_in_float64(torch.device("cpu"))
    ones = torch.ones
    monkeypatch.setattr(torch, "ones", lambda *size, dtype, device: ones(*size, dtype=torch.float32, device=device))
    assert not common._computes_in_float64(torch.device("cpu")), "computes in float32"


def test_a_pivot_far_from_the_mean():
    """The first images, from which the pivot is taken, are unlike the rest."""
    x = torch.randn(64, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    x[16:] += 30000
    with NarrowDevice():
        layer = SyncBatchNorm(3, momentum=1.0).to(DEVICE)
        layer(on_device(x))
        var = layer.running_var.cpu()
    plain = nn.BatchNorm2d(3, momentum=1.0)
    plain(x)
    expected = x.double().var((0, 2, 3))
    assert relative(var, expected) <= 2 * relative(plain.running_var, expected) + ROUNDINGS


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")
def test_a_compiled_layer_asks_once_where_float64_is(monkeypatch):
    """Devices that are not known by their name, such as Intel's."""
    monkeypatch.delitem(common._HAVE_FLOAT64, "cpu")
    layer, x = SyncBatchNorm(3), torch.randn(4, 3)
    expected = copy.deepcopy(layer)(x)
    found = torch.compile(layer, backend="eager", fullgraph=True)(x)
    assert relative(found.detach(), expected.detach()) < 1e-6
