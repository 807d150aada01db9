"""The two halves of a synchronisation: what is placed between them runs while the message travels, both ways."""

from contextlib import contextmanager

import pytest
import torch

from ranks import run_ranks
from syncbn import SyncBatchNorm
from syncbn.collectives import channel
from syncbn.nn import start_sync_batch_norm


class Watched:
    """A Work that notes when it is waited for."""

    def __init__(self, work, events):
        self.work, self.events = work, events

    def __getattr__(self, name):
        return getattr(self.work, name)

    def wait(self, *args, **kwargs):
        self.events.append("wait")
        return self.work.wait(*args, **kwargs)


@contextmanager
def recorded(events):
    """Notes "send" and "wait" as messages are launched and awaited."""

    def launch(*args):
        events.append("send")
        return Watched(original(*args), events)

    original, channel.launch = channel.launch, launch
    try:
        yield
    finally:
        channel.launch = original


class Marked(torch.autograd.Function):
    """Work that notes when it runs, forward and backward."""

    @staticmethod
    def forward(ctx, x, events):
        ctx.events = events
        events.append("work")
        return x * 2

    @staticmethod
    def backward(ctx, dy):
        ctx.events.append("work")
        return dy * 2, None


def one_synchronisation(rank):
    layers = [SyncBatchNorm(3), SyncBatchNorm(5, activation="relu")]
    inputs = [torch.randn(4, 3, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)]
    other = torch.randn(4, requires_grad=True)
    forward, backward = [], []
    events = forward
    with recorded(forward):
        pending = start_sync_batch_norm(layers, inputs)
        work = Marked.apply(other, backward)
        forward.append("work")
        backward.clear()
        outputs = pending.finish()
    events = backward
    with recorded(events):
        (sum(y.pow(2).sum() for y in outputs) + work.sum()).backward()
    return forward, backward


@pytest.mark.parametrize("P", [2, 3])
def test_work_between_start_and_finish_runs_while_the_message_travels(P):
    for forward, backward in run_ranks(one_synchronisation, P):
        assert forward == ["send", "work", "wait"]
        assert backward == ["send", "work", "wait"]


def two_under_way(rank):
    """Two messages sent before either is awaited, in both directions."""
    layers = [SyncBatchNorm(3), SyncBatchNorm(5)]
    inputs = [torch.randn(4, layer.num_features, requires_grad=True) for layer in layers]
    forward, backward = [], []
    with recorded(forward):
        pending = [start_sync_batch_norm([layer], [x]) for layer, x in zip(layers, inputs, strict=True)]
        outputs = [p.finish()[0] for p in pending]
    with recorded(backward):
        sum(y.pow(2).sum() for y in outputs).backward()
    return forward, backward


def test_two_messages_travel_at_once():
    for forward, backward in run_ranks(two_under_way, 2):
        assert forward == ["send", "send", "wait", "wait"]
        assert backward == ["send", "send", "wait", "wait"]


def a_branch_in_between(rank):
    """A convolution's whole branch (here a matrix product) between the halves: its backward runs under the message."""
    events = []
    layer, weight = SyncBatchNorm(3), torch.randn(3, 3, requires_grad=True)
    x = torch.randn(4, 3, requires_grad=True)
    weight.register_hook(lambda g: events.append("branch's gradient"))
    pending = start_sync_batch_norm([layer], [x])
    branch = x @ weight
    (y,) = pending.finish()
    with recorded(events):
        (y.pow(2).sum() + branch.sum()).backward()
    return events


def test_a_branch_runs_backward_under_the_message():
    for events in run_ranks(a_branch_in_between, 2):
        assert events == ["send", "branch's gradient", "wait"]


def test_halves_without_a_world():
    layer = SyncBatchNorm(3)
    x = torch.randn(4, 3, requires_grad=True)
    events = []
    with recorded(events):
        (y,) = start_sync_batch_norm([layer], [x]).finish()
        y.sum().backward()
    assert events == []
    assert layer.num_batches_tracked == 1
