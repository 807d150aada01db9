"""Where ranks hand each other texts: torch's key-value store, which works also where collectives fail."""

import datetime
import os
import sys
import time

import torch.distributed as dist

from syncbn.doctor.facts import Placement
from syncbn.progress import SECONDS_BETWEEN_LINES, left, stamped
from syncbn.training.launch.launchers import agent_keeps_store, attempt_of

POLL_SECONDS = 0.05


class Meeting:
    """The ranks of a launch, as far as they come.

    Args:
        placement: Of this rank. Rank 0 keeps the store, unless torchrun's agent does.
        seconds: How long to wait for rank 0, and for anything else.
        keeps_store: False for a further meeting of rank 0.

    Raises:
        OSError: Rank 0 does not answer.
    """

    def __init__(self, placement: Placement, seconds: float, keeps_store: bool = True) -> None:
        self.rank, self.world_size = placement.rank, placement.world_size
        self.deadline = time.monotonic() + seconds
        keeps_store = keeps_store and placement.rank == 0 and not agent_keeps_store(os.environ)
        try:
            self.tcp_store = dist.TCPStore(
                placement.address,
                placement.port,
                is_master=keeps_store,
                timeout=datetime.timedelta(seconds=seconds),
                wait_for_workers=False,
            )
        except (RuntimeError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            does = "cannot listen" if keeps_store else f"gets no answer within {seconds:g} s from rank 0"
            raise OSError(
                f"rank {placement.rank} on {placement.host} {does} at {placement.address}:{placement.port}"
                f" (MASTER_ADDR, MASTER_PORT): {reason}"
            ) from error
        self.store = dist.PrefixStore(f"syncbn/doctor/{attempt_of(os.environ)}", self.tcp_store)

    @property
    def seconds_left(self) -> float:
        """Until the time is up, at least a little."""
        return max(POLL_SECONDS, self.deadline - time.monotonic())

    def tell(self, subject: str, text: str) -> None:
        """Leave a text of this rank's."""
        self.store.set(f"{subject}/{self.rank}", text)

    def hear(self, subject: str, rank: int) -> str:
        """A rank's text, once it is there.

        Raises:
            TimeoutError: It does not come in time.
        """
        key = f"{subject}/{rank}"
        try:
            self.store.wait([key], datetime.timedelta(seconds=self.seconds_left))
            return self.store.get(key).decode()
        except RuntimeError as error:
            raise TimeoutError(f"rank {self.rank} heard nothing of rank {rank} about {subject}") from error

    def said(self, subject: str, rank: int) -> str | None:
        """A rank's text, None if it is not there."""
        key = f"{subject}/{rank}"
        return self.store.get(key).decode() if self.store.check([key]) else None

    def gather(self, subject: str, ranks: list[int]) -> dict[int, str]:
        """What each of the ranks said, of those that did so in time; rank 0 names those that it waits for."""
        heard: dict[int, str] = {}
        told = time.monotonic()
        while True:
            for rank in ranks:
                text = None if rank in heard else self.said(subject, rank)
                if text is not None:
                    heard[rank] = text
            if len(heard) == len(ranks) or time.monotonic() > self.deadline:
                return heard
            if self.rank == 0 and time.monotonic() - told >= SECONDS_BETWEEN_LINES:
                told = time.monotonic()
                missing = ", ".join(str(rank) for rank in ranks if rank not in heard)
                line = f"waiting for {subject} of rank {missing}, at most {left(self.seconds_left)}"
                print(stamped(line), file=sys.stderr, flush=True)
            time.sleep(POLL_SECONDS)

    def extend(self, seconds: float) -> None:
        """Allow so many seconds from now."""
        self.deadline = time.monotonic() + seconds
