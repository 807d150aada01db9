"""Keeps ranks that are in different layers from reducing different messages: an error that names them, not a hang.

Messages of different layers mostly differ in length, and a collective of unequal lengths hangs, aborts the process or
adds garbage up, depending on the backend. So a rank never sends a length that its peers may not expect:

- It remembers which message followed which few. A message that comes where the same one came before is sent at
  once: the peers remember the same. From the third step on this is every message, for a look-up in a dictionary.
- The first time, the ranks meet in the process group's key-value store and compare what each is about to send.
- A known message that comes where another was remembered is a new route, taken by all ranks or by mistake. The rank
  probes: it joins the remembered message's collective, at that length, under the id of its own. If its peers take the
  new route too they all probe, and agree; if not, everyone sees the ids disagree.

Peers are named through the store, which works when the collective does not.
"""

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

_CONTEXT = 8  # messages that tell one place in the network from another; a layer may be called several times
_GRACE_SECONDS = 2.0  # for peers to report their side once something is wrong
_ID_BITS = 20  # P * id^2 stays an exact float64 up to P = 8192

_generations: dict[str, int] = {}


class LayerMismatch(RuntimeError):
    """The ranks of a process group are in different layers."""


class LayerName(NamedTuple):
    """What a layer is called on this rank: its path in the model, "" for none; its kind; how many were built before."""

    path: str
    kind: str
    serial: int

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
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.size = group.rank(), group.size()
        self.ranks = dist.get_process_group_ranks(group)
        self.store = _store_of(group)
        self.timeout = _timeout_of(group)
        self.standard: dict[Message, str] = {}  # a message as the first rank to meet described it
        self.followed_by: dict[tuple[Message, ...], Message] = {}
        self.recent: deque[Message] = deque(maxlen=_CONTEXT)
        self.sent = 0

    def announce(self, message: Message, probe: Callable[[int, int, int], None], layers_built: int) -> tuple[int, int]:
        """Make sure that every rank is about to send `message`; returns its number, and the id to sign it with.

        Args:
            message: what this rank is about to send.
            probe: joins the collective of the given number at the given length under the given id; calls `fail` on
                mismatch.
            layers_built: how many layers this process has built so far; where ranks differ in that, paths must do.

        Raises:
            LayerMismatch: they are not, or some do not come within the process group's timeout.
        """
        if self.store is None:
            return 0, id_of(message.shape)
        self.sent += 1
        context = tuple(self.recent)
        expected = self.followed_by.get(context)
        known = message in self.standard
        if expected is None or not known:
            self._meet(self.sent, message, layers_built)
        elif expected.length != message.length:
            probe(self.sent, expected.length, id_of(self.standard[message]))
        self.followed_by[context] = message
        self.recent.append(message)
        return self.sent, id_of(self.standard[message])

    def fail(self, number: int, message: Message) -> NoReturn:
        """Tell the peers through the store what this rank sent as message `number`, and raise what all of them did."""
        raise LayerMismatch(
            "the ranks synchronise different BatchNorm layers, so their statistics cannot be added up: "
            + self.describe(number, message)
            + ". Every rank must run the same layers in the same order; give a rank without data an empty batch "
            "rather than skip a layer."
        )

    def describe(self, number: int, message: Message) -> str:
        """What each rank says it sent as message `number`; this one sent `message`."""
        self.recent.clear()
        said = {self.rank: str(message)} if self.store is None else self._reports(number, str(message))
        return "; ".join(f"rank {self.ranks[r]}: {said.get(r, 'nothing heard')}" for r in range(self.size))

    def _meet(self, number: int, message: Message, layers_built: int) -> None:
        """Compare notes in the store: the first rank's message is the standard, the last to agree opens the gate."""
        store, verdict = self.store, f"{number}/verdict"
        assert store is not None
        mine = self.standard.get(message) or json.dumps([*message, layers_built])
        standard = store.compare_set(f"{number}/message", "", mine).decode()
        either_known = message in self.standard or standard in self.standard.values()
        if not (mine == standard if either_known else _compatible(mine, standard)):
            store.set(verdict, "disagree")
        elif store.add(f"{number}/agreed", 1) == self.size:
            store.set(verdict, "agree")
        try:
            store.wait([verdict], self.timeout)
            agreed = store.get(verdict) == b"agree"
        except RuntimeError:  # time is up
            agreed = False
        if not agreed:
            self.fail(number, message)
        self.standard[message] = standard

    def _reports(self, number: int, text: str) -> dict[int, str]:
        """What each rank says it sent as message `number`; ranks that stay silent are left out."""
        said = {self.rank: text}
        # Across a link that was cut the store neither answers nor fails for a quarter of an hour.
        exchange = threading.Thread(target=self._exchange_reports, args=(number, said), daemon=True)
        exchange.start()
        exchange.join(2 * _GRACE_SECONDS)
        return dict(said)

    def _exchange_reports(self, number: int, said: dict[int, str]) -> None:
        """Tell the others what this rank says in `said`, and add what they say."""
        assert self.store is not None
        deadline = time.monotonic() + _GRACE_SECONDS
        try:
            self.store.set(f"{number}/report/{self.rank}", said[self.rank])
            while len(said) < self.size:
                for r in set(range(self.size)) - said.keys():
                    if self.store.check([f"{number}/report/{r}"]):
                        said[r] = self.store.get(f"{number}/report/{r}").decode()
                if time.monotonic() > deadline:
                    break
                time.sleep(0.01)
        except RuntimeError:
            pass  # the store is gone with its rank: report what is known


def id_of(text: str) -> int:
    """A number for a message's description, small enough that sums of its square are exact."""
    return zlib.crc32(text.encode()) >> (32 - _ID_BITS)


def _compatible(mine: str, standard: str) -> bool:
    """Whether two ranks' descriptions are of the same message.

    Layers are told apart by the order in which they were built; or, where one rank built more layers than another,
    by their paths, of which one may have a prefix more (a wrapper), and one may be missing.
    """
    *my_message, my_layers, my_length, my_built = json.loads(mine)
    *message, layers, length, built = json.loads(standard)
    if (my_message, my_length, len(my_layers)) != (message, length, len(layers)):
        return False
    for (my_path, my_kind, my_serial), (path, kind, serial) in zip(my_layers, layers, strict=True):
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
    store = dist.distributed_c10d._get_process_group_store(group)
    if store is None:
        return None
    # A group that is destroyed and made again has the same name: do not read what its predecessor left.
    generation = _generations[group.group_name] = _generations.get(group.group_name, 0) + 1
    return dist.PrefixStore(f"syncbn/{generation}", store)


def _timeout_of(group: dist.ProcessGroup) -> datetime.timedelta:
    for device in group._device_types:
        options = getattr(group._get_backend(torch.device(device)), "options", None)
        if options is not None:
            return options._timeout
    return dist.distributed_c10d.default_pg_timeout
