"""What an Inception module computes between sending a message and waiting for it, forward and backward."""

from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ranks import run_ranks
from syncbn.functional import exchange
from syncbn.models.blocks import UnitSpec
from syncbn.models.network import InceptionModule
from syncbn.models.table import TABLE

WORK = {
    "convolution": "convolution",
    "convolution_backward": "convolution",
    "avg_pool2d": "pool",
    "avg_pool2d_backward": "pool",
    "max_pool2d_with_indices": "pool",
    "max_pool2d_with_indices_backward": "pool",
}


class Recorder(TorchDispatchMode):
    """Writes down convolutions, pools, messages sent and messages waited for, in their order."""

    def __init__(self):
        super().__init__()
        self.events = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in WORK:
            self.events.append(WORK[name])
        return func(*args, **(kwargs or {}))


def reduction_in(events):
    class RecordedReduction(exchange.Reduction):
        def __init__(self, message, ticket):
            super().__init__(message, ticket)
            events.append("send")

        def wait(self):
            events.append("wait")
            return super().wait()

    return RecordedReduction


def events_of_module(rank, name):
    (row,) = (row for row in TABLE if row.name == name)
    torch.manual_seed(0)
    module = InceptionModule(16, row, UnitSpec())
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    found = []
    for _ in range(2):  # in the first step the ranks also agree
        with Recorder() as forward, mock.patch.object(exchange, "Reduction", reduction_in(forward.events)):
            y = module(x)
        with Recorder() as backward, mock.patch.object(exchange, "Reduction", reduction_in(backward.events)):
            y.sum().backward()
        found = [forward.events, backward.events]
    return found


def while_travelling(events):
    """For each message what was computed on its way, in the order in which they were sent."""
    journeys, current = [], None
    for event in events:
        if event == "send":
            assert current is None, "two messages at a time"
            current = []
        elif event == "wait":
            journeys.append(current)
            current = None
        elif current is not None:
            current.append(event)
    return journeys


@pytest.mark.parametrize(
    ("name", "forward", "backward"),
    [
        ("3b", [["convolution", "pool"], ["convolution"], []], [[], ["convolution"], ["pool", "convolution"]]),
        ("3c", [["pool"], ["convolution"], []], [[], ["convolution"], ["pool"]]),
        ("5b", [["pool", "convolution"], ["convolution"], []], [[], ["convolution"], ["convolution", "pool"]]),
    ],
)
def test_branches_compute_while_a_message_travels(name, forward, backward):
    for events in run_ranks(events_of_module, 2, name):
        assert [while_travelling(direction) for direction in events] == [forward, backward]
