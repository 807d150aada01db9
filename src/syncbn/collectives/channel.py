"""The way of the layers' messages between the ranks of a group: leave to send each, and what it travels through.

A message is a flat float64 tensor: the payload (sums, and in the forward the count), then the id of the layers it
belongs to, then its square. After the sum over P ranks, `id_sum == P * id` and `square_sum == P * id^2` hold together
only where all ranks sent the same id, and both sums are exact: so each message proves, at no extra collective, that
the ranks were in the same layer.
"""

import threading
from collections import deque
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.collectives.agreement import Agreement, Message, own_connection
from syncbn.collectives.communicator import (
    SHARE,
    backend_name,
    check_carries,
    may_have_own,
    own_communicator,
    when_destroyed,
)

ID_LENGTH = 2


class Channel:
    """The way of the layers' messages between the ranks of one group: the agreement on each, and a communicator.

    Args:
        group: the ranks.
        device: where the messages lie.
        name: of what carries them.

    Raises:
        ValueError: nothing carries them.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, name: str) -> None:
        self.group, self.device, self.name, self.size = group, device, name, group.size()
        self.adds_up = dist.get_backend(group) != "fake"
        shares = not may_have_own(group, device)
        if shares:
            check_carries(group, device)
        self.agreement = Agreement(group, device, shares)
        self.communicator = group if shares else None
        # What gloo's two threads may be busy with. A work holds Python objects: the thread that drops it last needs the
        # interpreter, and aborts a process that is about to exit.
        self.latest_works: deque[dist.Work | None] = deque(maxlen=2)

    def open(self, number: int, description: Message) -> None:
        """Make the communicator, as all ranks do that have just agreed on their first message.

        Raises:
            RuntimeError: one of them has died, or there is no room for more connections.
        """
        agreement = self.agreement
        assert agreement.store is not None
        try:
            store = dist.PrefixStore(f"communicator/{number}", own_connection(agreement.store, agreement.patience))
            self.communicator = own_communicator(self.group, self.device, store, agreement.patience)
        except RuntimeError as error:
            raise RuntimeError(
                "the ranks cannot be connected for the messages of BatchNorm layers: one has died, or there is no room "
                f"for more connections ({SHARE}=1 on all ranks sends the messages over the process group itself). "
                f"{agreement.describe(number, description)} ({error})"
            ) from error

    def send(self, message: Tensor) -> dist.Work | None:
        """Begin to sum a message up."""
        assert self.communicator is not None, "opened by `agree`, closed with the group"
        work = launch(message, self.communicator)
        if message.is_cpu:
            self.latest_works.append(work)
        return work

    def wait(self, work: dist.Work | None, number: int, description: Message) -> None:
        """Wait for a message; on a GPU the device does.

        Raises:
            RuntimeError: it fails.
        """
        try:
            if work is not None:  # some backends return none
                work.wait()
        except RuntimeError as error:
            raise self.agreement.miss(number, description, str(error)) from error

    def probe(self, number: int, length: int, id: int, description: Message, device: torch.device) -> None:
        """Join the all-reduce of this length under an id.

        Raises:
            LayerMismatch: not all ranks do so under the same id.
            RuntimeError: the all-reduce fails.
        """
        sums = torch.zeros(length, dtype=torch.float64, device=device)
        sums[-2], sums[-1] = id, id**2
        self.wait(self.send(sums), number, description)
        if sums[-ID_LENGTH:].tolist() != [self.size * id, self.size * id**2]:
            self.agreement.fail(number, description)

    def close(self) -> None:
        """Destroy the communicator with its group."""
        communicator, self.communicator = self.communicator, None
        self.latest_works.clear()
        if communicator is not None and communicator is not self.group:
            communicator.shutdown()


_channels: dict[dist.ProcessGroup, dict[torch.device, Channel]] = {}
_lock = threading.Lock()  # for new channels; ranks never wait for each other in it
_announced_before = 0  # over groups that are gone
_entered_last: Message | None = None


def _channel(group: dist.ProcessGroup, device: torch.device) -> Channel:
    try:
        return _channels[group][device]
    except KeyError:
        with _lock:
            if group not in _channels:
                when_destroyed(group, _close, group)
                _channels[group] = {}
            known, name = _channels[group], backend_name(group, device) or device.type
            same = (channel for channel in known.values() if channel.name == name)
            return known.setdefault(device, next(same, None) or Channel(group, device, name))


def _close(group: dist.ProcessGroup) -> None:
    global _announced_before
    for channel in set(_channels.pop(group).values()):
        _announced_before += channel.agreement.announced
        channel.close()


class Ticket(NamedTuple):
    """Leave to send one message: every rank of the group is about to send the same.

    For a `with` statement, at whose end a message that an error kept from being sent is taken back.
    """

    channel: Channel
    description: Message
    number: int
    id: int

    @property
    def signature(self) -> tuple[int, int]:
        """What the message must end with."""
        return self.id, self.id**2

    def __enter__(self) -> "Ticket":
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.agreement.take_back(self.number)


def agree(group: dist.ProcessGroup, description: Message, device: torch.device, layers_built: int) -> Ticket:
    """Make sure that all ranks of the group are about to send the message described.

    Args:
        group: the ranks.
        description: of this rank's message.
        device: where the message lies.
        layers_built: how many layers the threads that built these ones have built so far.

    Raises:
        LayerMismatch: they are about to send different ones.
        RuntimeError: some do not come within the group's timeout, or cannot be connected; or another thread is about to
            send a message over the group.
    """
    global _entered_last
    channel, _entered_last = _channel(group, device), description

    def probe(number: int, length: int, id: int) -> None:
        channel.probe(number, length, id, description, device)

    number, id = channel.agreement.announce(description, probe, layers_built)
    if channel.communicator is None:
        try:
            channel.open(number, description)
        except BaseException:
            channel.agreement.take_back(number)
            raise
    return Ticket(channel, description, number, id)


def launch(message: Tensor, group: dist.ProcessGroup) -> dist.Work | None:
    """Begin to sum a message up over the ranks of a group, in place: all messages of eager layers leave here."""
    options = dist.AllreduceOptions()
    options.asyncOp = True
    return group.allreduce([message], options)


def progress() -> tuple[int, str]:
    """How many messages of BatchNorm layers this process has sent, and the last one in words.

    For a thread that watches whether the process gets on: it costs the layers nothing.
    """
    with _lock:
        channels = {channel for known in list(_channels.values()) for channel in known.values()}
    announced = _announced_before + sum(channel.agreement.announced for channel in channels)
    return announced, "" if _entered_last is None else str(_entered_last)
