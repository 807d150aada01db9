"""Keeps ranks that are in different layers from reducing different messages: an error that names them, not a hang.

Messages of different layers mostly differ in length, and a collective of unequal lengths hangs, aborts the process or
adds garbage up, depending on the backend. So a rank never sends a length that its peers may not expect:

- It remembers which message followed which few. A message that comes where the same one came before is sent at
  once: the peers remember the same. From the third step on this is every message, for a look-up in a dictionary.
- The first time, the ranks meet in the process group's key-value store and compare what each is about to send.
- A known message that comes where another was remembered is a new route, taken by all ranks or by mistake. The rank
  probes: it joins the remembered message's collective, at that length, under the id of its own. If its peers take the
  new route too they all probe, and agree; if not, everyone sees the ids disagree.

Peers are named through the store, which works when the collective does not. A wait in a TCPStore blocks its connection
for all threads of the process, so each group's agreement has a connection of its own.
"""

import contextlib
import datetime
import json
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, NoReturn

import torch
import torch.distributed as dist

from syncbn.collectives.communicator import SHARE, backend_name, timeout_of

_CONTEXT = 8  # messages that tell one place in the network from another; a layer may be called several times
_GRACE_SECONDS = 2.0  # for peers to report their side once something is wrong
_ID_BITS = 20  # P * id^2 stays an exact float64 up to P = 8192


class LayerMismatch(RuntimeError):
    """The ranks of a process group are in different layers."""


class LayerName(NamedTuple):
    """What a layer is called on this rank: its path in the model, "" for none; its kind; how many its thread had built.

    And the number of that thread on this rank, which says nothing to others.
    """

    path: str
    kind: str
    serial: int
    thread: int = 0

    def __str__(self) -> str:
        return f"'{self.path}' {self.kind}" if self.path else f"{self.kind} #{self.serial}"


class Message(NamedTuple):
    """One all-reduce as the ranks must agree on it: the layers, "forward" or "backward", and its length."""

    direction: str
    layers: tuple[LayerName, ...]
    length: int

    def __str__(self) -> str:
        return f"{self.direction} of {', '.join(map(str, self.layers))}"

    @property
    def shape(self) -> str:
        """What does not depend on names."""
        return json.dumps([self.direction, [layer.kind for layer in self.layers], self.length])


class Agreement:
    """What the ranks of one group have sent so far, and so expect of each other.

    Args:
        group: the process group.
        device: where its messages lie; those of each backend of the group are numbered by themselves.
        shares: whether they travel over the group itself.
    """

    def __init__(self, group: dist.ProcessGroup, device: torch.device, shares: bool = False) -> None:
        self.rank, self.size = group.rank(), group.size()
        self.ranks = dist.get_process_group_ranks(group)
        self.key = f"syncbn/{backend_name(group, device) or device.type}"
        self.shares = shares
        self.group_store = _store_of(group)
        self.store: dist.Store | None = None  # connected when the ranks first meet
        self.timeout = timeout_of(group, device)
        # The end of it is for saying who is missing. A rank that left may wait in another collective until all of it is
        # over; its process then ends, and launchers such as torchrun end the others before they have said anything.
        self.reserve = min(self.timeout / 4, datetime.timedelta(seconds=_GRACE_SECONDS))
        self.patience = self.timeout - self.reserve
        self.standard: dict[Message, str] = {}  # a message as the first rank to meet described it
        self.followed_by: dict[tuple[Message, ...], Message] = {}
        self.recent: deque[Message] = deque(maxlen=_CONTEXT)
        self.turn = threading.Lock()  # of the message that is agreed on and has not left yet
        self.pending = 0
        self.number = 0  # of the message that left last, or failed
        self.announced = 0
        self.common: tuple[int, Message] | None = None  # the latest message that all ranks are known to have come to

    def announce(self, message: Message, probe: Callable[[int, int, int], None], layers_built: int) -> tuple[int, int]:
        """Make sure that every rank is about to send `message`; returns its number, and the id to sign it with.

        Then either `depart` or `take_back` has to follow.

        Args:
            message: what this rank is about to send.
            probe: joins the collective of the given number at the given length under the given id; calls `fail` on
                mismatch.
            layers_built: how many layers their threads have built so far; where ranks differ in that, paths must do.

        Raises:
            LayerMismatch: they are not.
            RuntimeError: some do not come within the process group's timeout, or another thread is about to send a
                message over the same group.
        """
        self.announced += 1
        if self.group_store is None:
            return 0, id_of(message.shape)
        if not self.turn.acquire(blocking=False):
            raise RuntimeError(
                f"two threads send messages of BatchNorm layers over one process group at the same time, this one "
                f"{message}: their order could differ between ranks. Give each thread a process group of its own "
                "(torch.distributed.new_group, and the layers' process_group)"
            )
        self.pending = number = self.number + 1
        try:
            expected = self.followed_by.get(tuple(self.recent))
            if expected is None or message not in self.standard:
                self._meet(number, message, layers_built)
            elif expected.length != message.length:
                probe(number, expected.length, id_of(self.standard[message]))
        except BaseException:
            self.take_back(number)
            raise
        return number, id_of(self.standard[message])

    def depart(self, number: int, message: Message) -> None:
        """Take note that a message agreed on has been sent."""
        if number:
            self.number = number
            self.followed_by[tuple(self.recent)] = message
            self.recent.append(message)
            self.take_back(number)

    def take_back(self, number: int) -> None:
        """Let others send. A message that has not left is forgotten: an error kept this rank from sending it."""
        if number and self.pending == number:
            self.pending = 0
            self.turn.release()

    def arrived(self, number: int, message: Message) -> None:
        """Take note that all ranks are known to have come to a message."""
        if self.common is None or number > self.common[0]:
            self.common = number, message

    def fail(self, number: int, message: Message) -> NoReturn:
        """Tell the peers through the store what this rank sent as message `number`, and raise what all of them did."""
        raise LayerMismatch(
            "the ranks synchronise different BatchNorm layers, so their statistics cannot be added up: "
            + self.describe(number, message)
            + ". Every rank must run the same layers in the same order; give a rank without data an empty batch "
            "rather than skip a layer."
        )

    def miss(self, number: int, message: Message, cause: str = "") -> RuntimeError:
        """The error for a message that some ranks have not come to; says where each rank was."""
        said = self.describe(number, message, self.reserve.total_seconds() / 2)
        return RuntimeError(
            "the all-reduce of a BatchNorm layer failed: a rank has died, or did not come in time (the timeout of the "
            f"process group: {self.timeout.total_seconds():g} s). {said}. Every rank must run every layer in training "
            "mode; give one whose data has ended empty batches (DistributedDataParallel's join() does not do it)"
            f"{cause and f' ({cause})'}"
        )

    def describe(self, number: int, message: Message, grace: float = _GRACE_SECONDS) -> str:
        """What each rank says it sent as message `number`; this one sent `message`. A silent one is where it was.

        Ranks have `grace` seconds to say so.
        """
        self.recent.clear()
        self.number = max(self.number, number)
        own = str(message) + (f", over the process group itself ({SHARE})" if self.shares else "")
        said = {self.rank: own} if self.group_store is None else self._reports(number, own, grace)
        silence = "nothing heard"
        if self.common is not None:
            silence = f"silent, last known at message {self.common[0]}, {self.common[1]}"
        return "; ".join(f"rank {self.ranks[r]}: {said.get(r, silence)}" for r in range(self.size))

    def _meet(self, number: int, message: Message, layers_built: int) -> None:
        """Compare notes in the store: the first rank's message is the standard, the last to agree opens the gate."""
        mine = self.standard.get(message) or json.dumps([*message, layers_built, self.shares])
        found: list[str] = []
        _in_time(self.patience.total_seconds() + _GRACE_SECONDS, self._compare, number, message, mine, found)
        if not found:
            raise self.miss(number, message)
        standard, verdict = found
        if verdict != "agree":
            self.fail(number, message)
        self.standard[message] = standard
        self.arrived(number, message)

    def _compare(self, number: int, message: Message, mine: str, found: list[str]) -> None:
        """Add the standard and the verdict to `found`, if all ranks come."""
        store, verdict = self._connected(), f"{number}/verdict"
        standard = store.compare_set(f"{number}/message", "", mine).decode()
        either_known = message in self.standard or standard in self.standard.values()
        if not (mine == standard if either_known else _compatible(mine, standard)):
            store.set(verdict, "disagree")
        elif store.add(f"{number}/agreed", 1) == self.size:
            store.set(verdict, "agree")
        store.wait([verdict], self.patience)
        found += [standard, store.get(verdict).decode()]

    def _connected(self) -> dist.Store:
        if self.store is None:
            assert self.group_store is not None
            store = own_connection(self.group_store, self.patience)
            # A group that is destroyed and made again has the same name: do not read what its predecessor left.
            times = store.add(f"{self.key}/{self.rank}", 1)
            self.store = dist.PrefixStore(f"{self.key}/{times}", store)
        return self.store

    def _reports(self, number: int, text: str, grace: float) -> dict[int, str]:
        """What each rank says it sent as message `number`; ranks that stay silent are left out."""
        said = {self.rank: text}
        _in_time(1.5 * grace, self._exchange_reports, number, said, grace)
        return dict(said)

    def _exchange_reports(self, number: int, said: dict[int, str], grace: float) -> None:
        """Tell the others what this rank says in `said`, and add what they say."""
        store, deadline = self._connected(), time.monotonic() + grace
        store.set(f"{number}/report/{self.rank}", said[self.rank])
        while len(said) < self.size:
            for r in set(range(self.size)) - said.keys():
                if store.check([f"{number}/report/{r}"]):
                    said[r] = store.get(f"{number}/report/{r}").decode()
            if time.monotonic() > deadline:
                break
            time.sleep(0.01)


def own_connection(store: dist.Store, timeout: datetime.timedelta) -> dist.Store:
    """The same store through a connection that no other thread uses; a store without connections as it is."""
    if not isinstance(getattr(store, "_underlying_non_prefix_store", store), dist.TCPStore):
        return store
    connection: dist.Store = store.clone()  # type: ignore[attr-defined]
    connection.set_timeout(timeout)
    return connection


def _in_time(seconds: float, look_up: Callable[..., None], *arguments: object) -> None:
    """Look something up in the store, for no longer than this.

    Across a link that was cut the store neither answers nor fails for a quarter of an hour. And when its rank has gone,
    what is not found out remains unknown.
    """

    def run() -> None:
        with contextlib.suppress(RuntimeError):
            look_up(*arguments)

    thread = threading.Thread(target=run, daemon=True, name="syncbn-store")
    thread.start()
    thread.join(seconds)


def id_of(text: str) -> int:
    """A number for a message's description, small enough that sums of its square are exact."""
    return zlib.crc32(text.encode()) >> (32 - _ID_BITS)


def _compatible(mine: str, standard: str) -> bool:
    """Whether two ranks' descriptions are of the same message.

    Layers are told apart by the order in which a thread built them; or, where that built more layers on one rank than
    on another, by their paths, of which one may have a prefix more (a wrapper), and one may be missing.
    """
    my_direction, my_layers, my_length, my_built, my_shares = json.loads(mine)
    direction, layers, length, built, shares = json.loads(standard)
    if (my_direction, my_length, len(my_layers), my_shares) != (direction, length, len(layers), shares):
        return False
    for (my_path, my_kind, my_serial, _), (path, kind, serial, _) in zip(my_layers, layers, strict=True):
        if my_kind != kind or (my_built == built and my_serial != serial):
            return False
        if my_built != built and my_path and path and not _one_ends_with_the_other(f".{my_path}", f".{path}"):
            return False
    return True


def _one_ends_with_the_other(a: str, b: str) -> bool:
    return a.endswith(b) or b.endswith(a)


def _store_of(group: dist.ProcessGroup) -> dist.Store | None:
    """The group's own corner of its store; None for backends without one."""
    if dist.get_backend(group) == "fake":
        return None
    return dist.distributed_c10d._get_process_group_store(group)
