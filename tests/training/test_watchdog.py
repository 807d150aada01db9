"""Who hangs is named, in words that a person who was not there can use."""

import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from syncbn.training.monitoring.watchdog import Watch, Watchdog

TIMEOUT = 2.0
LAYER = "BatchNorm layer entered last: forward of 'network.stem.bn'"


@dataclass
class Rank:
    """Where a rank stands; it gets on until `done` reaches `until`."""

    until: int
    text: str
    done: int = 0
    timeout_seconds: float = TIMEOUT

    def place(self) -> tuple[int, str]:
        self.done = min(self.done + 1, self.until)
        return self.done, self.text


class Told(Watch):
    """Says what it would print, and goes on living."""

    def __init__(self, rank: Rank, store: Any, number: int, num_ranks: int) -> None:
        super().__init__(rank, store, number, num_ranks, None, threading.Event())  # type: ignore[arg-type]
        self.interval = 0.1
        self.messages: list[str | None] = []

    def _exit(self, message: str | None) -> None:
        self.messages.append(message)
        self.stop.set()


def watch(ranks: list[Rank | None], seconds: float) -> list[list[str | None]]:
    """What each of several ranks says at its end; None for one whose process does nothing any more."""
    store = dist.HashStore()
    store.set_timeout(timedelta(seconds=5))
    watches = [Told(rank, store, number, len(ranks)) for number, rank in enumerate(ranks) if rank]
    threads = [threading.Thread(target=one.run, daemon=True) for one in watches]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + seconds
    for one, thread in zip(watches, threads, strict=True):
        thread.join(max(0.0, deadline - time.monotonic()))
        one.stop.set()
    return [one.messages for one in watches]


def test_the_rank_that_is_behind_is_named_once():
    said = watch([Rank(30, f"step 7, {LAYER}"), Rank(8, "step 7"), Rank(30, "step 7")], 30)
    spoken = [messages[0] for messages in said if messages and messages[0]]
    assert len(spoken) == 1 and all(len(messages) <= 1 for messages in said)
    assert spoken[0].startswith("rank 1 hangs, for 2 s, in step 7; the others wait for it, as rank ")


def test_a_rank_that_does_not_answer_is_named():
    said = watch([Rank(3, f"step 4, {LAYER}"), None], 30)
    assert said == [["rank 1 does not answer any more: stopped, or its host is gone"]]


def test_ranks_that_stand_at_one_place():
    said = watch([Rank(3, f"step 4, {LAYER}"), Rank(3, f"step 4, {LAYER}")], 30)
    assert [messages[0] for messages in said if messages and messages[0]] == [
        f"all 2 ranks have stood still for 2 s, in step 4, {LAYER}"
    ]


def test_ranks_that_get_on_are_left_alone():
    assert watch([Rank(10**6, "step 1"), Rank(10**6, "step 1")], 2.5 * TIMEOUT) == [[], []]


def test_alone_it_names_the_place():
    one = Told(Rank(2, "step 3"), None, 0, 1)
    one.run()
    assert one.messages == ["this process has stood still for 2 s: step 3"]


class Unreachable:
    """The store behind a link that was cut: what is sent is lost without an error, and no answer ever comes."""

    def __init__(self) -> None:
        self.mended = threading.Event()

    def set(self, key: str, value: str) -> None:
        """Only sends."""

    def add(self, key: str, amount: int) -> int:
        """Waits for the answer."""
        self.mended.wait()
        raise RuntimeError("connection reset")


def test_a_store_that_does_not_answer_is_not_waited_for():
    store = Unreachable()
    one = Told(Rank(2, f"step 3, {LAYER}"), store, 0, 2)
    thread = threading.Thread(target=one.run, daemon=True)
    thread.start()
    assert one.stop.wait(TIMEOUT + 20)
    assert one.messages == [f"the ranks stand still, this one for 2 s: step 3, {LAYER}"]
    store.mended.set()
    thread.join(10)


def test_a_negative_timeout_is_refused():
    with pytest.raises(ValueError, match=r"watchdog\.timeout_seconds=-1 must not be negative"):
        Watchdog(-1)
