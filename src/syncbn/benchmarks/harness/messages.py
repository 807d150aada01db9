"""What a computation sends: each collective that syncbn or a peer calls, and its bytes."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.benchmarks.harness.peers import ALL_GATHER
from syncbn.collectives import channel

ALL_REDUCE = "all_reduce"


class RecordedMessage(NamedTuple):
    """One collective.

    Attributes:
        collective: ALL_REDUCE or ALL_GATHER.
        given: bytes that each rank puts in.
        received: bytes of the buffer in which each rank finds the result.
    """

    collective: str
    given: int
    received: int

    def prepare(self, P: int, device: torch.device) -> Callable[[], Any]:
        """The same collective on zeros in the world of P ranks, to be called again and again."""
        given = torch.zeros(self.given, dtype=torch.uint8, device=device).view(torch.float32)
        if self.collective == ALL_REDUCE:
            return lambda: dist.all_reduce(given)
        received = given.new_empty(P * given.numel())
        return lambda: getattr(dist, ALL_GATHER)(received, given)


@contextlib.contextmanager
def recorded() -> Iterator[list[RecordedMessage]]:
    """Collects the messages that are sent inside the `with` block; DDP's own run beneath what is seen here."""
    messages: list[RecordedMessage] = []

    def all_reduce(tensor: Tensor, *args: Any, **more: Any) -> Any:
        messages.append(RecordedMessage(ALL_REDUCE, tensor.nbytes, tensor.nbytes))
        return real[ALL_REDUCE](tensor, *args, **more)

    def launch(message: Tensor, group: dist.ProcessGroup) -> Any:
        messages.append(RecordedMessage(ALL_REDUCE, message.nbytes, message.nbytes))
        return real_launch(message, group)

    def all_gather(received: Tensor, given: Tensor, *args: Any, **more: Any) -> Any:
        messages.append(RecordedMessage(ALL_GATHER, given.nbytes, received.nbytes))
        return real[ALL_GATHER](received, given, *args, **more)

    real = {name: getattr(dist, name) for name in (ALL_REDUCE, ALL_GATHER)}
    real_launch = channel.launch
    with (
        mock.patch.object(channel, "launch", launch),
        mock.patch.object(dist, ALL_REDUCE, all_reduce),
        mock.patch.object(dist, ALL_GATHER, all_gather),
    ):
        yield messages
