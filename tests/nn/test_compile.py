"""torch.compile(fullgraph=True) in training on gloo ranks: as eager, and one all-reduce a direction in the graph."""

import pytest
import torch
import torch.distributed as dist
from norm_cases import buffer_bytes, relative
from torch import nn

from graphs import counting_backend
from ranks import run_ranks
from syncbn import SyncBatchNorm, sync_batch_norm_group

# Raised inside torch itself while it compiles.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec.*:FutureWarning"),
]


class Plain(nn.Module):
    """Two layers in a row, the second with a residual and a cumulative average."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), SyncBatchNorm(4, activation="relu")
        self.conv2, self.norm2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), SyncBatchNorm(4, momentum=None)

    def forward(self, x):
        x = self.norm(self.conv(x))
        return self.norm2(self.conv2(x), x).relu()


class Grouped(nn.Module):
    """Three layers in one message, two of them side by side in one input."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([SyncBatchNorm(4, activation="relu"), SyncBatchNorm(3), SyncBatchNorm(2)])

    def forward(self, x):
        return torch.cat(sync_batch_norm_group([self.norms[0], list(self.norms[1:])], [self.a(x), self.b(x)]), 1)


NETWORKS = {"plain": Plain, "grouped": Grouped}


def batch(rank, step, n=4):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(10 * step + rank), dtype=torch.float64)


def run(net, forward, rank, sizes=(4, 4, 4)):
    """SGD steps, gradients added up over the ranks as DDP does: all that came out of them."""
    optimiser = torch.optim.SGD(net.parameters(), 0.05)
    outputs = []
    for step, n in enumerate(sizes):
        optimiser.zero_grad()
        x = batch(rank, step, n).requires_grad_()
        y = forward(x)
        weights = torch.arange(y.numel(), dtype=y.dtype).sin().view_as(y)  # so that no gradient vanishes
        (y.pow(2) * weights).mean().backward()
        for p in net.parameters() if dist.is_initialized() else []:
            dist.all_reduce(p.grad)
        outputs += [y.detach(), x.grad, *(p.grad for p in net.parameters())]
        optimiser.step()
    return outputs + list(net.buffers())


def errors_of(compiled, net, name, rank, sizes):
    eager = NETWORKS[name]().double()
    true = run(eager, eager, rank, sizes)
    found = run(net, compiled, rank, sizes)
    return [relative(a, b) for a, b in zip(found, true, strict=True)]


def traced(rank, name):
    net, counts = NETWORKS[name]().double(), []
    compiled = torch.compile(net, fullgraph=True, backend=counting_backend(counts))
    errors = errors_of(compiled, net, name, rank, (4, 4, 3 + rank))  # the last batch is traced again
    return errors, counts, buffer_bytes(net)


@pytest.mark.parametrize(("name", "messages"), [("plain", 2), ("grouped", 1)])
def test_traced_whole_with_one_collective_a_message(name, messages):
    found = run_ranks(traced, 2, name, timeout=200, group_timeout=100)
    for errors, counts, buffers in found:
        assert max(errors) < 1e-10, errors
        assert set(counts) == {messages}
        assert len(counts) <= 4
        assert buffers == found[0][2]


def compiled_by_inductor(rank):
    net = Grouped().double()
    compiled = torch.compile(net, fullgraph=True)
    return errors_of(compiled, net, "grouped", rank, (4, 4)), buffer_bytes(net)


def test_compiled_by_inductor():
    found = run_ranks(compiled_by_inductor, 2, timeout=280, group_timeout=200)
    for errors, buffers in found:
        assert max(errors) < 1e-10, errors
        assert buffers == found[0][1]


def test_traced_without_a_world_and_in_eval():
    net, counts = Plain().double(), []
    compiled = torch.compile(net, fullgraph=True, backend=counting_backend(counts))
    assert max(errors_of(compiled, net, "plain", 0, (4, 4))) < 1e-10
    assert counts == [0, 0]
    net.eval()
    torch.testing.assert_close(compiled(batch(0, 6)), net(batch(0, 6)))
