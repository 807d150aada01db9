"""group_messages: the messages of any network, and that it computes what the network did."""

import copy
import importlib
import io
import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from branching_networks import NETWORKS, ConvNorm
from graphs import counting_backend
from ranks import RankError, run_ranks
from syncbn import (
    SyncBatchNorm,
    convert_sync_batchnorm,
    estimate_population_statistics,
    group_messages,
    new_group,
    revert_sync_batchnorm,
)
from syncbn.benchmarks.harness.messages import recorded
from syncbn.grouping.network import Grouped
from syncbn.nn import fold_batch_norm

MESSAGES = {  # before, after
    "RepVGG": (28, 11),
    "MobileOne": (46, 9),
    "HRNet": (70, 23),
    "ResNet": (22, 19),
    "DenseNet": (6, 6),
    "DeepLabV3's ASPP": (15, 9),
    "feature pyramid": (33, 17),
    "two views": (22, 9),
}
PIXELS = 32


def cadene() -> nn.Module:
    """Inception-BN branch by branch, as others write it."""
    sys.path.append(str(Path(__file__).parent / "models" / "weights"))
    return importlib.import_module("reference_networks").CadeneBNInception(5, 0.125)


ALL = {**NETWORKS, "Inception-BN": cadene}
MESSAGES["Inception-BN"] = (69, 33)


class Diamond(nn.Module):
    """Two branches, of two layers and of one, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.long = nn.Sequential(ConvNorm(3, 4, 3), ConvNorm(4, 4, 3))
        self.short = ConvNorm(3, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.head((self.long(x) + scale * self.short(x)).mean((2, 3)))


def synchronised(make: Any = Diamond) -> nn.Module:
    torch.manual_seed(0)
    return convert_sync_batchnorm(make().double())


def images(rank: int = 0, n: int = 2) -> Tensor:
    return torch.randn(n, 3, PIXELS, PIXELS, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def grouped(make: Any = Diamond) -> nn.Module:
    return group_messages(synchronised(make), images())


def leaves(y: Any) -> list[Tensor]:
    return [leaf for part in y for leaf in leaves(part)] if isinstance(y, list | tuple) else [y]


def step(network: Any, x: Tensor, **options: Any) -> dict[str, Tensor]:
    """Outputs, gradients and buffers of a training step, and the number of its messages."""
    network.zero_grad()
    with recorded() as messages:
        outputs = leaves(network(x, **options))
        sum((y.pow(3) + y).sum() for y in outputs).backward()
    network = network.module if isinstance(network, DistributedDataParallel) else network
    gradients = {f"gradient {name}": p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
    found = {f"result {i}": y.detach() for i, y in enumerate(outputs)} | gradients
    buffers = {name: b.clone() for name, b in network.named_buffers()}
    return found | buffers | {"messages": torch.tensor(len(messages))}


def worst(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference, relative to the largest number of its tensor, or to the largest gradient."""
    assert found.keys() == expected.keys()
    gradient = max(float(v.abs().max()) for name, v in expected.items() if name.startswith("gradient "))
    errors = [0.0]
    for name, true in expected.items():
        scale = gradient if name.startswith("gradient ") else max(float(true.abs().max()), 0.01)
        errors += [] if name == "messages" else [float((found[name] - true).abs().max()) / scale]
    return max(errors)


# ---- networks ------------------------------------------------------------------------------------


def networks_on_ranks(rank: int, names: list[str]) -> dict[str, Any]:
    found = {}
    for name in names:
        plain = synchronised(ALL[name])
        network = group_messages(copy.deepcopy(plain), images())
        one_by_one, together = step(plain, images(rank)), step(network, images(rank))
        found[name] = worst(together, one_by_one), one_by_one["messages"], together["messages"], together
    return found


@pytest.fixture(scope="module")
def on_two_ranks():
    return run_ranks(networks_on_ranks, 2, list(ALL), timeout=280)


@pytest.mark.parametrize("name", ALL)
def test_fewer_messages_and_the_same_numbers(name, on_two_ranks):
    for error, before, after, _ in (rank[name] for rank in on_two_ranks):
        assert error < 1e-12
        assert (before, after) == tuple(2 * number for number in MESSAGES[name])


def one_process(name: str, P: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    return step(ALL[name]().double(), torch.cat([images(rank) for rank in range(P)]))


def joined(ranks: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What ranks found as one process would."""
    found = {}
    for name, first in ranks[0].items():
        parts = [rank[name] for rank in ranks]
        if name.startswith("result "):
            found[name] = torch.cat(parts)
        else:
            found[name] = sum(parts) if name.startswith("gradient ") else first
            assert name.startswith("gradient ") or all(torch.equal(part, first) for part in parts)
    return found


@pytest.mark.parametrize("name", ALL)
def test_two_ranks_are_one_process(name, on_two_ranks):
    assert worst(joined([rank[name][-1] for rank in on_two_ranks]), one_process(name, 2)) < 1e-10


def test_four_ranks_are_one_process():
    name = "two views"
    ranks = run_ranks(networks_on_ranks, 4, [name], timeout=120)
    assert worst(joined([rank[name][-1] for rank in ranks]), one_process(name, 4)) < 1e-10


@pytest.mark.parametrize("name", ["RepVGG", "two views"])
def test_the_program_without_a_world(name):
    """Which a network alone does not run: its own forward sends no message either."""
    plain = synchronised(ALL[name])
    network = group_messages(copy.deepcopy(plain), images())
    plan = network._grouping.shown
    assert len(plan.schedule.messages) == plan.schedule.longest_chain == MESSAGES[name][1]
    network.forward = lambda x: plan.run([x])
    assert worst(step(network, images()), step(plain, images())) < 1e-12


# ---- what a network is used for -----------------------------------------------------------------


def uses(rank: int) -> dict[str, Any]:
    torch.manual_seed(0)
    x, found = images(rank), {}
    expected = step(synchronised(), x)
    found["before, after"] = int(expected["messages"]), int(step(grouped(), x)["messages"])

    def compare(name: str, network: Any, **more: Any) -> None:
        result = step(network, x, **more)
        found[name] = worst(result, expected), int(result["messages"])

    compare("deepcopy", copy.deepcopy(grouped()))
    compare("pickle", pickle.loads(pickle.dumps(grouped())))
    compare("by name", grouped(), scale=1.0)
    compare("moved", grouped().float().double().requires_grad_())
    found["moved"] = found["moved"][1:]  # whose parameters were rounded
    loaded = grouped()
    loaded.load_state_dict(synchronised().state_dict())
    compare("state_dict", loaded)
    compare("ungrouped", grouped().ungroup())
    network = grouped()
    compare("checkpoint", _Checkpointed(network))
    compare("checkpoint, reentrant", _Checkpointed(grouped(), reentrant=True))
    with_eval = grouped()
    step(with_eval, x), with_eval.eval(), with_eval(x), with_eval.train()
    found["eval and back"] = int(step(with_eval, x)["messages"])
    found["averaged"] = step(DistributedDataParallel(grouped()), x)["gradient head.weight"]
    found["gradient"] = expected["gradient head.weight"]
    return found


class _Checkpointed(nn.Module):
    def __init__(self, network: nn.Module, reentrant: bool = False) -> None:
        super().__init__()
        self.__dict__["network"], self.reentrant = network, reentrant
        self._parameters, self._buffers, self._modules = network._parameters, network._buffers, network._modules

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.network, x.requires_grad_(self.reentrant), use_reentrant=self.reentrant)


@pytest.fixture(scope="module")
def used():
    return run_ranks(uses, 2, timeout=200)


@pytest.mark.parametrize(
    "name",
    ["deepcopy", "pickle", "by name", "state_dict", "checkpoint", "checkpoint, reentrant"],
)
def test_uses(name, used):
    for rank in used:
        assert rank["before, after"] == (6, 4)
        error, messages = rank[name]
        assert error < 1e-12
        assert messages == 4


def test_modes_moving_and_ungrouping(used):
    for rank in used:
        assert rank["ungrouped"] == (0.0, 6)
        assert rank["moved"] == (4,)
        assert rank["eval and back"] == 4


def test_distributed_data_parallel(used):
    mean = (used[0]["gradient"] + used[1]["gradient"]) / 2
    for rank in used:
        torch.testing.assert_close(rank["averaged"], mean, rtol=1e-12, atol=1e-12)


def hooks_and_changes(rank: int) -> dict[str, Any]:
    """What the layers of a grouped network see, and what a change of the network after grouping does."""
    x, found = images(rank), {}

    def seen(network: nn.Module) -> list[tuple[str, Tensor]]:
        calls: list[tuple[str, Tensor]] = []
        for name in ("short.1", "long", "long.1.0"):
            module = network.get_submodule(name)
            module.register_forward_pre_hook(
                lambda _, inputs, name=name: calls.append((f"into {name}", inputs[0].sum()))
            )
            module.register_forward_hook(lambda _, inputs, y, name=name: calls.append((name, y.detach().sum())))
        network.short[1].register_forward_hook(lambda _, inputs, y: y * 2)
        network.long.register_full_backward_hook(lambda _, dx, dy: calls.append(("back", dy[0].sum())))
        result = step(network, x)
        return result, sorted((name, float(value)) for name, value in calls)

    network = grouped()
    step(network, x)  # traced without hooks
    for name, one in (("grouped", network), ("plain", synchronised())):
        if name == "plain":
            step(one, x)
        found[name] = seen(one)
    network = grouped()
    network.short = nn.Sequential(nn.Conv2d(3, 4, 1), SyncBatchNorm(4), nn.ReLU(), SyncBatchNorm(4)).double()
    found["replaced"] = step(network, x)["messages"]
    frozen = grouped()
    frozen.short[1].eval()
    twin = synchronised()
    twin.short[1].eval()
    found["frozen"] = worst(step(frozen, x), step(twin, x)), step(frozen, x)["messages"]
    apart = synchronised()
    apart.short[1].process_group = new_group(1)
    apart.long[0][1].process_group = apart.long[1][1].process_group = new_group(2)
    with_global = grouped()
    handle = nn.modules.module.register_module_forward_hook(lambda module, inputs, y: None)
    found["global hook"] = step(with_global, x)["messages"]
    handle.remove()
    estimated, twin = grouped(), synchronised()
    for one in (estimated, twin):
        estimate_population_statistics(one, [x, x + 1], 2)
    found["estimated"] = worst(step(estimated, x), step(twin, x))
    found["groups"] = step(group_messages(apart, x), x)["messages"]
    return found


def test_hooks_and_changes():
    for rank in run_ranks(hooks_and_changes, 2, timeout=120):
        (found, calls), (expected, expected_calls) = rank["grouped"], rank["plain"]
        assert [name for name, _ in calls] == [name for name, _ in expected_calls]
        assert [value for _, value in calls] == pytest.approx([value for _, value in expected_calls], rel=1e-10)
        assert worst(found, expected) < 1e-12
        assert rank["replaced"] == 4  # two chains of two
        error, messages = rank["frozen"]
        assert error < 1e-12
        assert messages == 4
        assert rank["groups"] == 4
        assert rank["global hook"] == 6
        assert rank["estimated"] < 1e-12


def compiled(rank: int) -> tuple[float, list[int]]:
    x, counts = images(rank), list[int]()
    network = grouped()
    found = step(torch.compile(network, backend=counting_backend(counts), fullgraph=True), x)
    found = {name.replace("_orig_mod.", ""): value for name, value in found.items()}
    return worst(found, step(synchronised(), x)), counts


def test_a_compiled_network():
    for error, counts in run_ranks(compiled, 2, timeout=200):
        assert error < 1e-12
        assert counts == [2, 2]


def parts_of_one_rank(rank: int) -> None:
    x = images(rank)
    network = group_messages(synchronised(), x)
    if rank:
        network.short[1].eval()
    step(network, x)


def test_a_rank_in_other_layers_is_named():
    with pytest.raises(RankError) as error:
        run_ranks(parts_of_one_rank, 2, timeout=60)
    assert any("LayerMismatch" in kind and "short" in text for kind, text in error.value.errors.values())


# ---- on one process ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.jit and torch.export
def test_revert_fold_and_export():
    network, x = grouped(), images()
    plain = synchronised().eval()
    step(network, x)
    plain.load_state_dict(network.state_dict())
    expected = plain(x)
    torch.testing.assert_close(network.eval()(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(fold_batch_norm(network)(x), expected, rtol=1e-10, atol=1e-10)
    scripted = torch.jit.script(network)
    torch.testing.assert_close(scripted(x), expected, rtol=0, atol=0)
    exported = torch.export.export(network, (x,)).module()
    torch.testing.assert_close(exported(x), expected, rtol=1e-10, atol=1e-10)
    kept = list(network.modules())
    assert revert_sync_batchnorm(network) is network
    assert list(network.modules()) == kept
    assert not any(isinstance(module, SyncBatchNorm | Grouped) for module in network.modules())


@pytest.mark.filterwarnings("ignore")  # of the exporter's own packages
def test_onnx():
    onnx = pytest.importorskip("onnxruntime")
    network, x = grouped().float().eval(), images().float()
    program = torch.onnx.export(network, (x,), dynamo=True, verbose=False)
    buffer = io.BytesIO()
    program.save(buffer)
    (found,) = onnx.InferenceSession(buffer.getvalue()).run(None, {program.model.graph.inputs[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), network(x), rtol=1e-4, atol=1e-5)


def test_the_network_is_what_it_was():
    network, twin = grouped(), synchronised()
    assert isinstance(network, Diamond)
    assert list(network.state_dict()) == list(twin.state_dict())
    assert [name for name, _ in network.named_modules()] == [name for name, _ in twin.named_modules()]
    assert all(module.training for module in network.modules())
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), twin.state_dict().values(), strict=True)
    )


def test_the_schedule_is_shown(capsys, tmp_path):
    network = grouped()
    network.print_schedule()
    assert capsys.readouterr().out.splitlines() == [
        "3 layers, 2 messages each way",
        "   1  long.0.1  (meanwhile: short.0)",
        "   2  long.1.1, short.1",
    ]
    network.draw_schedule(tmp_path / "schedule.png")
    assert (tmp_path / "schedule.png").stat().st_size > 1000


class Decides(nn.Module):
    """By the values of its input, which way to go."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = Diamond(), Diamond()
        self.norm = nn.BatchNorm1d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.a(x) if x.sum() > -1e9 else self.b(x))


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.inner = Diamond(), Decides()

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.inner(x)


class Sets(Diamond):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)


class Keeps(Diamond):
    def __init__(self) -> None:
        super().__init__()
        self.seen = list[Tensor]()

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return super().forward(x)


class Saves(Diamond):
    def forward(self, x: Tensor) -> Tensor:
        return self.head((checkpoint(self.long, x, use_reentrant=False) + self.short(x)).mean((2, 3)))


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Tensor:
        return dy * 3


class HasFunction(Diamond):
    def forward(self, x: Tensor) -> Tensor:
        return Double.apply(super().forward(x))


class Stops(Diamond):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            y = self.long(x)
        return self.head((y + self.short(x)).mean((2, 3)))


class Draws(Diamond):
    def forward(self, x: Tensor) -> Tensor:
        import random

        return super().forward(x) * (2 if random.random() < 2 else 1)


UNTRACEABLE = {
    Decides: "control flow depends on what gt computes",
    Sets: "sets self.calls",
    Keeps: "sets self.seen, a list",
    Saves: "how gradients, autocast or saved tensors",
    HasFunction: "how gradients, autocast or saved tensors",
    Stops: "how gradients, autocast or saved tensors",
    Draws: "random numbers in Python",
}


@pytest.mark.parametrize("kind", UNTRACEABLE)
def test_what_cannot_be_traced_is_named_and_works_as_before(kind):
    network = synchronised(kind)
    with pytest.warns(UserWarning, match=f"the forward of {kind.__name__} cannot be traced.*{UNTRACEABLE[kind]}"):
        group_messages(network, images())
    assert network._grouping.shown.program is None
    assert not hasattr(network, "calls") and not getattr(network, "seen", None)
    assert worst(step(network, images()), step(synchronised(kind), images())) == 0


def around(rank: int) -> tuple[float, int, int]:
    network = synchronised(Around)
    with pytest.warns(UserWarning, match="'inner' .Decides. cannot be traced"):
        group_messages(network, images())
    expected, found = step(synchronised(Around), images(rank)), step(network, images(rank))
    return worst(found, expected), int(expected["messages"]), int(found["messages"])


def test_the_rest_is_grouped_and_so_are_the_parts():
    for error, before, after in run_ranks(around, 2, timeout=60):
        assert error < 1e-12
        assert (before, after) == (14, 10)  # two of `one`, two of `inner.a`, `inner.norm`


class InPlace(nn.Module):
    """Changes in place, whose order against the reads of the same memory counts; and random numbers in branches."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.a, self.b, self.c = (ConvNorm(3, 3, relu=False) for _ in range(4))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        a = F.dropout(self.a(y * 2), 0.5)
        y.mul_(0.5)
        b = self.b(y * 2)
        view = y.view(-1)
        view += 1
        self.count.add_(1)
        c = F.dropout(self.c(y * 2), 0.5)
        c[:, :1] = 0
        return a + b + c * self.count


def in_place(rank: int) -> tuple[float, int, int]:
    network, plain, found = grouped(InPlace), synchronised(InPlace), []
    for one in (network, plain):
        torch.manual_seed(rank)
        step(one, images(rank))
        found.append(step(one, images(rank)))
    return worst(*found), int(found[1]["messages"]), int(found[0]["messages"])


def test_changes_in_place_and_random_numbers_keep_their_order():
    for error, before, after in run_ranks(in_place, 2, timeout=60):
        assert error < 1e-12
        assert (before, after) == (8, 4)


class Sized(Diamond):
    """Asks for sizes, kinds and the mode."""

    def forward(self, x: Tensor) -> Any:
        assert isinstance(x, Tensor) and x.dim() == 4 and x.dtype is torch.float64
        n, _, height, width = x.shape
        if height % 2:
            x = F.pad(x, (0, width % 2, 0, 1))
        if len(x) > 2 or not self.training:
            x = x * 2
        y = self.long(x) + self.short(x)
        return {"features": y, "logits": self.head(y.view(n, y.size(1), -1).mean(-1)), "other": (None, n)}


def sizes(rank: int) -> list[tuple[float, int]]:
    network, plain, found = grouped(Sized), synchronised(Sized), []
    for shape in ((2, 3, 32, 32), (3, 3, 17, 16), (2, 3, 32, 32)):
        x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
        with recorded() as messages:
            y = network(x)
        true = plain(x)
        assert list(y) == list(true) and y["other"] == true["other"]
        found.append((float((y["logits"] - true["logits"]).abs().max()), len(messages)))
    return found


def test_sizes_are_asked_for():
    assert run_ranks(sizes, 2, timeout=60) == [[(0.0, 2)] * 3] * 2


BAD = {
    "no norm": (lambda: nn.Sequential(nn.Linear(3, 3)), "no SyncBatchNorm; its norms: none: there is nothing"),
    "other norms": (lambda: nn.Sequential(nn.LayerNorm(3), nn.LayerNorm(3)), "2 LayerNorm: there is nothing"),
    "not converted": (Diamond, "3 BatchNorm2d: convert it with convert_sync_batchnorm"),
    "a layer": (lambda: SyncBatchNorm(3), "single layer"),
    "compiled": (lambda: torch.compile(synchronised()), "OptimizedModule: group the network in it"),
    "no module": (lambda: 3, "expected a torch.nn.Module"),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile
@pytest.mark.parametrize("name", BAD)
def test_bad_networks(name):
    make, text = BAD[name]
    with pytest.raises(ValueError, match=text):
        group_messages(make(), images())


@pytest.mark.parametrize("inputs", [(), (images()[:, :2],), (images(), 1.0, 2), (3,)])
def test_bad_inputs(inputs):
    network = synchronised()
    with pytest.raises(ValueError, match=r"^group_messages: the network does not run on these inputs: ") as error:
        group_messages(network, *inputs)
    assert "\n" not in str(error.value)
    assert type(network) is Diamond
