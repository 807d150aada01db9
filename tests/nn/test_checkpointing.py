"""Activation checkpointing: the forward that backward runs again neither reduces nor updates a second time."""

import itertools

import pytest
import torch
from norm_cases import buffer_bytes, relative
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential
from traffic import Traffic

from ranks import run_ranks
from syncbn import SyncBatchNorm, sync_batch_norm_group
from syncbn.nn import start_sync_batch_norm

REENTRANT = pytest.mark.parametrize("reentrant", [True, False])
WORLDS = pytest.mark.parametrize("P", [1, 2])


def network(seed=0):
    torch.manual_seed(seed)
    layers = [nn.Linear(3, 5), SyncBatchNorm(5, activation="relu"), nn.Linear(5, 4), SyncBatchNorm(4)]
    return nn.Sequential(*layers).double()


def batch(rank, step=0, n=6):
    return torch.randn(n + rank, 3, generator=torch.Generator().manual_seed(100 * step + rank)).double()


def gradients_of(net, *xs):
    return [x.grad for x in xs] + [p.grad for p in net.parameters()]


def differences(found, true):
    return [relative(a, b) for a, b in zip(found, true, strict=True) if b.abs().max() > 1e-9]


def one_block(rank, reentrant):
    found, traffic, buffers = [], [], []
    for checkpointed in (False, True):
        net, total = network(), None
        for step in range(3):
            x = batch(rank, step).requires_grad_()
            with Traffic() as sent:
                y = checkpoint(net, x, use_reentrant=reentrant) if checkpointed else net(x)
                y.pow(3).sum().backward()
            total = [x.grad] if total is None else [*total, x.grad]
        found.append(total + gradients_of(net))
        traffic.append(sent.count)
        buffers.append(buffer_bytes(net))
        counts = [m.num_batches_tracked.item() for m in net if isinstance(m, SyncBatchNorm)]
        assert counts == [3, 3], counts
    return differences(*reversed(found)), traffic, buffers[0] == buffers[1]


@REENTRANT
@WORLDS
def test_a_checkpointed_block(P, reentrant):
    for errors, traffic, same_buffers in run_ranks(one_block, P, reentrant):
        assert max(errors) < 1e-12
        assert traffic == ([4, 4] if P > 1 else [0, 0])
        assert same_buffers


@REENTRANT
def test_a_checkpointed_block_without_a_world(reentrant):
    errors, traffic, same_buffers = one_block(0, reentrant)
    assert max(errors) < 1e-12
    assert traffic == [0, 0]
    assert same_buffers


def momentum_none(rank, reentrant):
    layer = SyncBatchNorm(3, momentum=None).double()
    xs = [batch(rank, step).requires_grad_() for step in range(4)]
    for x in xs:
        checkpoint(layer, x, use_reentrant=reentrant).pow(3).sum().backward()
    plain = SyncBatchNorm(3, momentum=None).double()
    for x in xs:
        plain(x)
    return relative(layer.running_var, plain.running_var), layer.num_batches_tracked.item()


@REENTRANT
def test_cumulative_average(reentrant):
    for error, count in run_ranks(momentum_none, 2, reentrant):
        assert error < 1e-12
        assert count == 4


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = SyncBatchNorm(3).double()

    def forward(self, x):
        return self.norm(self.norm(x).sin() * 2)


def the_same_layer_twice(rank, reentrant):
    found = []
    for checkpointed in (False, True):
        net, x = Twice(), batch(rank).requires_grad_()
        with Traffic() as sent:
            (checkpoint(net, x, use_reentrant=reentrant) if checkpointed else net(x)).pow(3).sum().backward()
        assert net.norm.num_batches_tracked == 2
        found.append([*gradients_of(net, x), net.norm.running_mean, net.norm.running_var])
    return differences(*found), sent.count


@REENTRANT
@WORLDS
def test_the_same_layer_twice_in_a_block(P, reentrant):
    for errors, sent in run_ranks(the_same_layer_twice, P, reentrant):
        assert max(errors) < 1e-12
        assert sent == (4 if P > 1 else 0)


def many_calls_before_backward(rank, reentrant, calls):
    """Micro-batches of a pipeline or steps of a recurrence: many forwards, then all the backwards."""
    found = []
    for checkpointed in (False, True):
        layer = SyncBatchNorm(3).double()
        xs = [batch(rank, step, n=3).requires_grad_() for step in range(calls)]
        ys = [checkpoint(layer, x, use_reentrant=reentrant) if checkpointed else layer(x) for x in xs]
        sum(y.pow(3).sum() for y in ys).backward()
        found.append([*gradients_of(layer, *xs), layer.running_var])
        assert layer.num_batches_tracked == calls
    return differences(*found)


@REENTRANT
@pytest.mark.parametrize("calls", [5, 150])
def test_many_calls_before_backward(reentrant, calls):
    for errors in run_ranks(many_calls_before_backward, 2, reentrant, calls):
        assert max(errors) < 1e-12


def one_rank_repeats_itself(rank, reentrant):
    """Rank 0 sees the same batch in two calls, rank 1 does not: the same local sums, different statistics."""
    found = []
    for checkpointed in (False, True):
        layer = SyncBatchNorm(3).double()
        xs = [batch(rank, step if rank else 0).requires_grad_() for step in range(3)]
        ys = [checkpoint(layer, x, use_reentrant=reentrant) if checkpointed else layer(x) for x in xs]
        sum(y.pow(3).sum() for y in ys).backward()
        found.append(gradients_of(layer, *xs))
    return differences(*found)


@REENTRANT
def test_one_rank_repeats_itself_within_a_step(reentrant):
    for errors in run_ranks(one_rank_repeats_itself, 2, reentrant):
        assert max(errors) < 1e-12


def one_rank_repeats_itself_over_steps(rank, reentrant):
    found = []
    for checkpointed in (False, True):
        layer, total = SyncBatchNorm(3).double(), []
        for step in range(3):
            x = batch(rank, step if rank else 0).requires_grad_()
            (checkpoint(layer, x, use_reentrant=reentrant) if checkpointed else layer(x)).pow(3).sum().backward()
            total.append(x.grad)
        found.append(total)
    return differences(*found)


@REENTRANT
def test_one_rank_repeats_itself_over_steps(reentrant):
    for errors in run_ranks(one_rank_repeats_itself_over_steps, 2, reentrant):
        assert max(errors) < 1e-12


def an_empty_rank(rank, reentrant):
    found = []
    for checkpointed in (False, True):
        net, total = network(), []
        for step in range(2):
            x = batch(rank, step)[: 0 if rank == step else 5].requires_grad_()
            (checkpoint(net, x, use_reentrant=reentrant) if checkpointed else net(x)).pow(3).sum().backward()
            total.append(x.grad)
        found.append(total + gradients_of(net))
    return [relative(a, b) for a, b in zip(*found, strict=True) if b.numel() and b.abs().max() > 1e-9]


@REENTRANT
def test_an_empty_rank(reentrant):
    for errors in run_ranks(an_empty_rank, 2, reentrant):
        assert max(errors) < 1e-12


class Nested(nn.Module):
    def __init__(self, reentrant, checkpointed):
        super().__init__()
        self.inner, self.outer = network(1), SyncBatchNorm(4).double()
        self.reentrant, self.checkpointed = reentrant, checkpointed

    def forward(self, x):
        y = checkpoint(self.inner, x, use_reentrant=self.reentrant) if self.checkpointed else self.inner(x)
        return self.outer(y.tanh())


def nested(rank, inside, outside):
    found = []
    for checkpointed in (False, True):
        net, total = Nested(inside, checkpointed), []
        for step in range(2):
            x = batch(rank, step).requires_grad_()
            with Traffic() as sent:
                (checkpoint(net, x, use_reentrant=outside) if checkpointed else net(x)).pow(3).sum().backward()
            total.append(x.grad)
        assert [m.num_batches_tracked.item() for m in net.modules() if isinstance(m, SyncBatchNorm)] == [2, 2, 2]
        found.append(total + gradients_of(net) + [b.double() for b in net.buffers()])
    return differences(*found), sent.count


@pytest.mark.parametrize(("inside", "outside"), list(itertools.product([True, False], repeat=2)))
def test_nested(inside, outside):
    for errors, sent in run_ranks(nested, 2, inside, outside):
        assert max(errors) < 1e-12
        assert sent == 6


def grouped(rank, reentrant):
    found = []
    for checkpointed in (False, True):
        layers = nn.ModuleList([SyncBatchNorm(3, activation="relu"), SyncBatchNorm(3), SyncBatchNorm(2)]).double()

        def block(x, layers=layers):
            pending = start_sync_batch_norm([[layers[0]], layers[2]], [x, x[:, :2] * 2])
            middle = x.sin()
            a, b = pending.finish([middle, None])
            (c,) = sync_batch_norm_group([layers[1]], [a + middle])
            return torch.cat([c, b], 1)

        x = batch(rank).requires_grad_()
        with Traffic() as sent:
            (checkpoint(block, x, use_reentrant=reentrant) if checkpointed else block(x)).pow(3).sum().backward()
        found.append([*gradients_of(layers, x), *(b.double() for b in layers.buffers())])
    return differences(*found), sent.count


@REENTRANT
@WORLDS
def test_grouped(P, reentrant):
    for errors, sent in run_ranks(grouped, P, reentrant):
        assert max(errors) < 1e-12
        assert sent == (4 if P > 1 else 0)


def sequential(rank):
    found = []
    for checkpointed in (False, True):
        net, x = nn.Sequential(network(0), nn.Linear(4, 3).double(), network(1)), batch(rank).requires_grad_()
        torch.nn.init.eye_(net[1].weight)
        torch.nn.init.zeros_(net[1].bias)
        y = checkpoint_sequential(net, 3, x, use_reentrant=False) if checkpointed else net(x)
        y.pow(3).sum().backward()
        found.append(gradients_of(net, x))
    return differences(*found)


def test_checkpoint_sequential():
    for errors in run_ranks(sequential, 2):
        assert max(errors) < 1e-12


def steps_with_and_without(rank):
    """Forwards without gradient, plain steps and checkpointed steps of one model, mixed; a retained graph."""
    found = []
    for checkpointed in (False, True):
        net, total = network(), []
        for step in range(6):
            x = batch(rank, step).requires_grad_()
            if step % 3 == 0:
                with torch.no_grad():
                    net(x)
                continue
            again = checkpointed and step % 3 == 1
            loss = (checkpoint(net, x, use_reentrant=False) if again else net(x)).pow(3).sum()
            if step == 5:
                loss.backward(retain_graph=True)
            loss.backward()
            total.append(x.grad)
        found.append(total + gradients_of(net) + [b.double() for b in net.buffers()])
    return differences(*found)


def test_steps_with_and_without():
    for errors in run_ranks(steps_with_and_without, 2):
        assert max(errors) < 1e-12


def offloaded(rank):
    """Saved tensors moved elsewhere by hooks: no checkpoint, though it looks like one."""
    net, twin, x = network(), network(), batch(rank).requires_grad_()
    with torch.autograd.graph.save_on_cpu():
        net(x).pow(3).sum().backward()
    found, x.grad = [x.grad], None
    twin(x).pow(3).sum().backward()
    return differences([*found, *gradients_of(net)], gradients_of(twin, x))


def test_saved_tensor_hooks():
    for errors in run_ranks(offloaded, 2):
        assert max(errors) < 1e-12


class ForwardInBackward(torch.autograd.Function):
    """A node whose backward calls a model for the first time, as energy-based and implicit models do."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        with torch.no_grad():
            return ctx.layer(dy), None


def a_true_forward_inside_backward(rank):
    """It is no recomputation: it must be synchronised, though the layer ran without gradient before."""
    layer = SyncBatchNorm(3).double()
    with torch.no_grad():
        layer(batch(rank, 1))
    x = batch(rank).requires_grad_()
    dy = torch.arange(x.numel()).double().view_as(x).sin() * (rank + 1)
    ForwardInBackward.apply(x, layer).backward(dy)
    whole = torch.cat([torch.arange((6 + r) * 3).double().view(-1, 3).sin() * (r + 1) for r in range(2)])
    from syncbn.ops import reference

    true = reference.batch_norm(whole).y.split([6, 7])[rank]
    return relative(x.grad, true), layer.num_batches_tracked.item()


def test_a_true_forward_inside_backward():
    for error, count in run_ranks(a_true_forward_inside_backward, 2):
        assert error < 1e-12
        assert count == 2
