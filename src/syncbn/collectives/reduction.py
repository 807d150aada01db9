"""The one all-reduce of a message, and who watches the waits for it."""

from typing import Protocol

import torch
from torch import Tensor

from syncbn.collectives.channel import ID_LENGTH, Ticket
from syncbn.ops import Signature, has_memory


class Reduction:
    """One all-reduce under way.

    Args:
        message: flat float64, summed up in place; ends with the ticket's signature.
        ticket: the ranks' agreement to send it.
    """

    def __init__(self, message: Tensor, ticket: Ticket) -> None:
        self.message, self.ticket = message, ticket
        self.work = ticket.channel.send(message)
        ticket.channel.agreement.depart(ticket.number, ticket.description)

    def wait(self) -> tuple[Tensor, Signature | None]:
        """The message summed over all ranks, and its signature where that is still to be checked.

        On a CPU it has been. Elsewhere reading it would stall the device: whoever uses the sums has to make them NaN
        where the ranks disagree.

        Raises:
            LayerMismatch: the ranks sent different layers' messages.
            RuntimeError: the collective failed.
        """
        channel, description, number, _ = self.ticket
        observer = _wait_observer
        if self.message.is_cuda and torch.cuda.is_current_stream_capturing():
            observer = None
        if observer is not None:
            observer.begin()
        channel.wait(self.work, number, description)
        if observer is not None:
            observer.end()
        if self.message.is_cpu and has_memory(self.message):
            self.message = _taken_from(self.message)
        if not channel.adds_up:
            return self.message, None
        id_sum, square_sum = (channel.size * part for part in self.ticket.signature)
        found = self.message[-ID_LENGTH:]
        if not may_be_read(found):
            return self.message, Signature(found, (id_sum, square_sum))
        if found.tolist() != [id_sum, square_sum]:
            channel.agreement.fail(number, description)
        channel.agreement.arrived(number, description)
        return self.message, None


_NOTHING = torch.empty(0, dtype=torch.float64)


def _taken_from(message: Tensor) -> Tensor:
    """The sums, and no memory left in `message`, which the works hold that the channel keeps."""
    sums = message.detach()
    message.data = _NOTHING
    return sums


class WaitObserver(Protocol):
    """Told when a layer begins to wait for its message, and when it goes on: on a GPU in the order of its stream."""

    def begin(self) -> None:
        """The wait begins."""

    def end(self) -> None:
        """The message is there."""


_wait_observer: WaitObserver | None = None


def observe_waits(observer: WaitObserver | None) -> None:
    """Tell `observer` of every wait for a message from now on, in place of another; None tells nobody."""
    global _wait_observer
    _wait_observer = observer


def may_be_read(numbers: Tensor) -> bool:
    """Whether the host may look at them: on another device it would stall, tracers and transforms have none."""
    return numbers.is_cpu and has_memory(numbers)
