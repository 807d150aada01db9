"""The layer under torch.func, forward-mode AD, torch.fx and fake tensors, alone: what nn.BatchNorm2d does."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close
from torch.utils._pytree import tree_map

from ranks import run_ranks
from syncbn import SyncBatchNorm, convert_sync_batchnorm

pytestmark = [
    pytest.mark.usefixtures("float64"),
    # torch's own, of its decompositions and of operators that it batches in a loop
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning"),
]

UNTRACKED = {"track_running_stats": False, "dtype": torch.float64}  # said, since ranks have no fixture


def both():
    """A layer and torch's with the same random parameters, and an input that needs its statistics about its mean."""
    ours, theirs = SyncBatchNorm(3, **UNTRACKED), nn.BatchNorm1d(3, **UNTRACKED)
    for p in theirs.parameters():
        nn.init.uniform_(p)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, torch.randn(4, 3, 5, dtype=torch.float64) + 3


def gradients(layer, x):
    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).pow(3).sum()

    return torch.func.grad(loss, argnums=(0, 1))(dict(layer.named_parameters()), x)


def tangents(layer, x):
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(layer(forward_ad.make_dual(x, x.square()))))


TRANSFORMS = {
    "grad": gradients,
    "vmap": lambda layer, x: torch.func.vmap(layer)(torch.stack([x, x.square()])),
    "jvp": lambda layer, x: torch.func.jvp(layer, (x,), (x.square(),)),
    "jacrev": lambda layer, x: torch.func.jacrev(layer)(x),
    "hessian": lambda layer, x: torch.func.hessian(lambda x: layer(x).pow(3).sum())(x),
    "dual numbers": tangents,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_transforms(transform, training):
    ours, theirs, x = both()
    assert_close(transform(ours.train(training), x), transform(theirs.train(training), x))


def test_dual_numbers_update_the_averages():
    ours, theirs = SyncBatchNorm(3), nn.BatchNorm1d(3)
    x = torch.randn(4, 3, 5)
    assert_close(tangents(ours, x), tangents(theirs, x))
    assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))


def test_averages_cannot_be_updated_inside_a_transform():
    with pytest.raises(RuntimeError, match="mutate a captured Tensor"):
        gradients(SyncBatchNorm(3), torch.randn(4, 3, 5))
    with pytest.raises(ValueError, match=r"running_mean can follow one alone.*stack_module_state"):
        torch.func.vmap(SyncBatchNorm(3))(torch.randn(2, 4, 3, 5))


@pytest.mark.parametrize("training", [True, False])
def test_symbolic_trace_takes_a_layer_for_one_node(training):
    network = nn.Sequential(nn.Conv1d(3, 3, 1), nn.BatchNorm1d(3), SyncBatchNorm(3, activation="relu"))
    convert_sync_batchnorm(network).train(training)
    graph = fx.symbolic_trace(network)
    assert [node.target for node in graph.graph.nodes if node.op == "call_module"] == ["0", "1", "2"]
    x = torch.randn(4, 3, 5)
    assert_close(graph(x), network(x))


def test_symbolic_trace_with_a_residual():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = SyncBatchNorm(3, activation="relu")

        def forward(self, x):
            return self.bn(x, x.square())

    block, x = Block(), torch.randn(4, 3, 5)
    assert_close(fx.symbolic_trace(block)(x), block(x))


@pytest.mark.parametrize("training", [True, False])
def test_fake_tensors(training):
    with FakeTensorMode():
        layer = SyncBatchNorm(3).train(training)
        x = torch.randn(4, 3, 5, requires_grad=True)
        layer(x).sum().backward()
    assert x.grad.shape == (4, 3, 5)
    assert layer.weight.grad.shape == (3,)


@pytest.mark.parametrize("training", [True, False])
def test_what_make_fx_records_depends_on_the_input(training):
    """Compiled passes go past the recorder, which would keep their outputs as constants."""
    layer = SyncBatchNorm(3, track_running_stats=not training).train(training)
    graph = make_fx(layer)(torch.randn(4, 3, 5))
    x = torch.randn(4, 3, 5)
    with torch.no_grad():
        assert_close(graph(x), layer(x))


TRANSFORMS_ON_RANKS = {**TRANSFORMS, "functionalize": lambda layer, x: torch.func.functionalize(layer)(x)}


def gradients_on_ranks(rank):
    torch.manual_seed(0)
    ours, theirs, x = both()
    part = slice(2 * rank, 2 * rank + 2)
    (found, dx), (whole, whole_dx) = gradients(ours, x[part]), gradients(theirs, x)
    assert_close(dx, whole_dx[part])
    torch.distributed.all_reduce(found["weight"])  # each rank has its share
    assert_close(found["weight"], whole["weight"])
    for name in ("vmap", "jvp", "dual numbers", "functionalize"):
        transform = TRANSFORMS_ON_RANKS[name]
        found, whole = transform(ours, x[part]), transform(theirs, x)
        assert_close(found, tree_map(lambda y: y.narrow(-3, 2 * rank, 2), whole), msg=name)


def test_transforms_on_two_ranks_are_those_of_one():
    run_ranks(gradients_on_ranks, 2)
