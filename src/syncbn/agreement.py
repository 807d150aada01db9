"""Keeps ranks that are in different layers from reducing different messages: an error that names them, not a hang.

Messages of different layers mostly differ in length, and a collective of unequal lengths hangs, aborts the process or
adds garbage up, depending on the backend. So a rank never sends a length that its peers may not expect:

- It remembers which message followed which few. A message that comes where the same one came before is sent at
  once: the peers remember the same. From the third step on this is every message, for a look-up in a dictionary.
- The first time, the ranks meet in the process group's key-value store and compare what each is about to send.
- A message that comes where another was remembered is a new route, taken by all ranks or by mistake. The rank probes:
  it joins the remembered message's collective, at that length, under its own id. If its peers take the new route too
  they all probe, and agree; if not, everyone sees the ids disagree.

Peers are named through the store, which works when the collective does not.
"""

import time
from collections import deque
from collections.abc import Callable
from typing import NamedTuple, NoReturn

import torch.distributed as dist

_CONTEXT = 8  # messages that tell one place in the network from another; a layer may be called several times
_GRACE_SECONDS = 2.0  # for peers to report their side once something is wrong

_generations: dict[str, int] = {}


class LayerMismatch(RuntimeError):
    """The ranks of a process group are in different layers."""


class Message(NamedTuple):
    """One all-reduce as the ranks must agree on it: the layers and direction in words, and its length."""

    text: str
    length: int


class Agreement:
    """What the ranks of one group have sent so far, and so expect of each other.

    Args:
        group: the process group.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.size = group.rank(), group.size()
        self.ranks = dist.get_process_group_ranks(group)
        self.store = _store_of(group)
        self.followed_by: dict[tuple[Message, ...], Message] = {}
        self.recent: deque[Message] = deque(maxlen=_CONTEXT)
        self.sent = 0

    def announce(self, message: Message, probe: Callable[[int, int], None]) -> int:
        """Make sure that every rank is about to send `message`; returns its number.

        Args:
            message: what this rank is about to send.
            probe: joins the collective of the given number at the given length, and calls `fail` on mismatch.

        Raises:
            LayerMismatch: they are not, or some do not come within the process group's timeout.
        """
        if self.store is None:
            return 0
        self.sent += 1
        number = self.sent
        context = tuple(self.recent)
        expected = self.followed_by.get(context)
        if expected is None:
            self._meet(number, message)
        elif expected.length != message.length:  # at equal length the message's own id is check enough
            probe(number, expected.length)
        self.followed_by[context] = message
        self.recent.append(message)
        return number

    def fail(self, number: int, text: str) -> NoReturn:
        """Tell the peers through the store what this rank sent as message `number`, and raise what all of them did."""
        said = self._reports(number, text)
        lines = [f"rank {self.ranks[r]}: {said.get(r, 'nothing heard')}" for r in range(self.size)]
        raise LayerMismatch(
            "the ranks synchronise different BatchNorm layers, so their statistics cannot be added up: "
            + "; ".join(lines)
            + ". Every rank must run the same layers in the same order; give a rank without data an empty batch "
            "rather than skip a layer."
        )

    def _meet(self, number: int, message: Message) -> None:
        """Compare notes in the store: the first rank's message is the standard, the last to agree opens the gate."""
        store, verdict = self.store, f"{number}/verdict"
        assert store is not None
        mine = f"{message.text}|{message.length}"
        if store.compare_set(f"{number}/message", "", mine).decode() != mine:
            store.set(verdict, "disagree")
        elif store.add(f"{number}/agreed", 1) == self.size:
            store.set(verdict, "agree")
        try:
            agreed = store.get(verdict) == b"agree"
        except RuntimeError:  # the store's timeout is the process group's
            agreed = False
        if not agreed:
            self.fail(number, message.text)

    def _reports(self, number: int, text: str) -> dict[int, str]:
        """What each rank says it sent as message `number`; ranks that stay silent are left out."""
        said = {self.rank: text}
        assert self.store is not None
        deadline = time.monotonic() + _GRACE_SECONDS
        try:
            self.store.set(f"{number}/report/{self.rank}", text)
            while len(said) < self.size:
                for r in set(range(self.size)) - said.keys():
                    if self.store.check([f"{number}/report/{r}"]):
                        said[r] = self.store.get(f"{number}/report/{r}").decode()
                if time.monotonic() > deadline:
                    break
                time.sleep(0.01)
        except RuntimeError:
            pass  # the store is gone with its rank: report what is known
        return said


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
