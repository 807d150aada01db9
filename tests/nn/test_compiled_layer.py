"""One layer or a few in a compiled graph: against the float64 oracle, alone and on ranks, and what the graph holds."""

import pytest
import torch
from norm_cases import Case, errors, failures, make_layer, relative
from torch import nn

from exactness import TOLERANCE
from graphs import operators_backend
from ranks import run_ranks
from syncbn import SyncBatchNorm, sync_batch_norm_group
from syncbn.nn import start_sync_batch_norm

# Raised inside torch itself while it compiles.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec.*:FutureWarning"),
]

TAIL = (3, 6, 4)
CASES = [
    Case(TAIL, dtype=torch.float64, residual=True, activation="relu"),
    Case(TAIL, layout="channels_last", dy_layout="channels_last", activation="relu"),
    Case(TAIL, layout="channels_last", residual=True),
    Case(TAIL, affine=False, activation="relu", momentum=None),
    Case((3, 7), layout="sliced_last", dy_layout="sliced_channels"),
    Case((3,), (20,)),
    Case(TAIL, mean=1000.0, std=3.0),  # float32 holds x to 6e-5, a sixth of which is lost in no sum
]
SPLITS = [(4, 4), (1, 5), (6, 0)]
WAIT = ("_local_scalar_dense", "lift_fresh_copy", "nonzero")


def compiled(case):
    torch.compiler.reset()  # else it gives up compiling after a few layers
    layer = make_layer(case)
    layer.compile(fullgraph=True, backend="aot_eager")
    return layer


@pytest.mark.parametrize("case", CASES, ids=str)
def test_as_the_oracle(case):
    assert failures(case, errors(case, layer=compiled(case))) == []


def failures_on_ranks(rank):
    found = []
    for i, case in enumerate(CASES[:5]):
        split = Case(**{**vars(case), "sizes": SPLITS[i % len(SPLITS)]})
        found += failures(split, errors(split, rank, compiled(split)))
    return found


def test_two_ranks_as_one():
    """Also with unequal batches, and with none on one rank."""
    assert run_ranks(failures_on_ranks, 2, timeout=120, group_timeout=60) == [[], []]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_as_eager(dtype):
    """To one rounding of the dtype, of elements; the parameters' gradients come from the same sums."""
    case = Case(TAIL, (8,), activation="relu", layout="channels_last", dy_layout="channels_last")
    results = []
    for layer in (make_layer(case), compiled(case)):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(case.shape, generator=generator).to(dtype).requires_grad_()
        y = layer(x)
        y.backward(torch.randn(case.shape, generator=generator).to(dtype))
        assert y.dtype == x.grad.dtype == dtype
        results.append([y.detach(), x.grad, layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var])
    limits = [TOLERANCE[dtype]] * 2 + [TOLERANCE[torch.float32]] * 4
    assert [relative(b, a) < limit for a, b, limit in zip(*results, limits, strict=True)] == [True] * 6


def results_of_one_value(rank):
    layer = compiled(Case((3,)))
    return layer(torch.ones(1 - rank, 3)).isnan().all().item(), layer.running_mean.tolist(), layer.running_var.tolist()


def test_one_value_on_all_ranks_gives_nan():
    """A graph cannot raise: as on a GPU. The moving averages stay."""
    assert run_ranks(results_of_one_value, 2) == [(True, [0.0] * 3, [1.0] * 3)] * 2


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("inputs", [1, 2, 3])
@pytest.mark.parametrize("no_grad", [False, True])
def test_a_message_of_inputs_that_need_no_gradient(inputs, no_grad):
    torch.compiler.reset()
    layers = [SyncBatchNorm(4, affine=False) for _ in range(inputs)]
    xs = [torch.randn(5, 4, generator=torch.Generator().manual_seed(i)) for i in range(inputs)]
    with torch.set_grad_enabled(not no_grad):
        found = torch.compile(sync_batch_norm_group, fullgraph=True, backend="aot_eager")(layers, xs)
    for y, x in zip(found, xs, strict=True):
        torch.testing.assert_close(y, nn.functional.batch_norm(x, None, None, training=True))


def test_one_value_alone_is_refused():
    with pytest.raises(Exception, match="expected more than 1 value per channel"):
        compiled(Case((3,)))(torch.ones(1, 3))


class Branches(nn.Module):
    """While the message of a travels, a convolution of b runs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (nn.Conv2d(3, 4, 3, bias=False) for _ in range(2))
        self.norm = SyncBatchNorm(4, activation="relu")

    def forward(self, x):
        pending = start_sync_batch_norm([self.norm], [self.a(x)])
        b = self.b(x)
        return pending.finish()[0] + b


def graphs_of_branches(rank):
    """Of all parameters, and where those of the convolutions are frozen."""
    graphs = {False: [], True: []}
    for frozen, found in graphs.items():
        torch.compiler.reset()
        torch.manual_seed(0)
        net = Branches()
        net.requires_grad_(not frozen)
        net.norm.requires_grad_(True)
        y = torch.compile(net, fullgraph=True, backend=operators_backend(found))(torch.randn(2, 3, 6, 6))
        y.sum().backward()
    return graphs[False], graphs[True]


@pytest.fixture(scope="module")
def branches():
    """The graphs of each rank, by whether its convolutions were frozen."""
    whole, frozen = zip(*run_ranks(graphs_of_branches, 2, timeout=120, group_timeout=60), strict=True)
    return {False: whole, True: frozen}


def test_other_branches_lie_between_a_message_and_its_use(branches):
    for forward, backward in branches[False]:
        for graph, convolution in ((forward, "convolution"), (backward, "convolution_backward")):
            names = [name.split(".")[1] for name in graph]
            between = names[names.index("all_reduce") : names.index("wait_tensor")]
            assert convolution in between, graph


def test_no_message_goes_back_where_no_input_wants_a_gradient(branches):
    for forward, backward in branches[True]:
        assert len([name for name in forward if "all_reduce" in name]) == 1
        assert not [name for name in backward if "all_reduce" in name]


def test_nothing_in_the_graphs_makes_the_host_wait(branches):
    """Nor do they copy from the host: torch would use no CUDA graphs."""
    for found in branches[False]:
        names = {name for graph in found for name in graph}
        assert {"syncbn.forward_message.default", "syncbn.backward_sums.default"} <= names
        assert not [n for n in names if n.split(".")[1] in WAIT]


def test_transforms_inside_a_graph():
    """Which have to see through a layer's operators."""
    layer = SyncBatchNorm(3, track_running_stats=False, dtype=torch.float64)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    functions = [
        torch.func.grad(lambda x: layer(x).pow(3).sum()),
        lambda x: torch.func.jvp(layer, (x,), (x.sin(),))[1],
    ]
    for function in functions:
        torch.testing.assert_close(torch.compile(function, fullgraph=True, backend="aot_eager")(x), function(x))
