"""Ends a run whose ranks make no progress, and says which rank hangs, in which step and layer."""

import json
import os
import sys
import threading
import time
from datetime import timedelta
from typing import Any, NamedTuple

import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from syncbn.collectives.channel import progress

FAILED = 1
"""Exit status of a run that the watchdog ended: that of any other error."""


class Beat(NamedTuple):
    """What a rank says of itself, every few seconds.

    Attributes:
        number: Of the beat, by which others see that the process lives.
        done: Counts whatever it does: batches begun and ended, messages sent.
        place: Where it is, in words.
        still: Seconds since `done` changed.
    """

    number: int
    done: int
    place: str
    still: float


class Watchdog(Callback):
    """Ends the run, on all ranks and in one line, when no rank has got on for a while.

    A thread notes where its rank is: the step, and the BatchNorm layer entered last. It tells the others through the
    key-value store of the process group, by a connection of its own, which works while collectives hang. When its rank
    has stood still for the timeout, so have the others, which wait for each other; the one that has got least far, or
    has ceased to answer, is named. No step is slower for it.

    Args:
        timeout_seconds: Standing still for so long is a hang. It has to be longer than the longest single thing that a
            rank does: a batch, a checkpoint, the preparation of the data, compiling. 0 for no watchdog.

    Raises:
        ValueError: ``timeout_seconds`` is negative.
    """

    def __init__(self, timeout_seconds: float = 600.0) -> None:
        if timeout_seconds < 0:
            raise ValueError(f"watchdog.timeout_seconds={timeout_seconds} must not be negative; 0 for no watchdog")
        self.timeout_seconds = timeout_seconds
        self._events, self._phase = 0, "before the first step"
        self._stop = threading.Event()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to watch."""
        if not self.timeout_seconds or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._stop = threading.Event()
        store = None
        if dist.is_available() and dist.is_initialized() and trainer.world_size > 1:
            default = dist.distributed_c10d._get_default_store()
            # A clone, since a connection is not free while the training waits in it.
            store = dist.PrefixStore(f"watchdog/{stage}", default.clone())  # type: ignore[attr-defined]
            store.set_timeout(timedelta(seconds=self.timeout_seconds))
        self._note("before the first step")
        watch = Watch(self, store, trainer.global_rank, trainer.world_size, trainer.strategy.launcher, self._stop)
        threading.Thread(target=watch.run, daemon=True, name="syncbn-watchdog").start()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Note the place."""
        self._note(f"step {trainer.global_step}")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the place."""
        self._note(f"after step {trainer.global_step - 1}")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, *_: int
    ) -> None:
        """Note the place."""
        self._note(f"validation batch {batch_idx} after step {trainer.global_step - 1}")

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, *_: int
    ) -> None:
        """Note the place."""
        self._note(f"test batch {batch_idx}")

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note the place."""
        self._note(f"writing a checkpoint after step {trainer.global_step - 1}")

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Watch no more."""
        self._stop.set()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Watch no more."""
        self._stop.set()

    def _note(self, phase: str) -> None:
        self._phase = phase
        self._events += 1

    def place(self) -> tuple[int, str]:
        """How much this rank has done so far, and where it is; called by the watching thread."""
        messages, last = progress()
        layer = f", BatchNorm layer entered last: {last}" if last else ""
        return self._events + messages, self._phase + layer


class Watch:
    """The thread of one rank.

    Args:
        watchdog: Knows where the rank is.
        store: To tell the others, None where there are none.
        rank: This one.
        num_ranks: All.
        launcher: Of the trainer; its processes are killed with this one.
        stop: Ends the thread.
    """

    def __init__(
        self, watchdog: Watchdog, store: dist.Store | None, rank: int, num_ranks: int, launcher: Any, stop: Any
    ) -> None:
        self.watchdog, self.store, self.rank, self.num_ranks = watchdog, store, rank, num_ranks
        self.launcher, self.stop = launcher, stop
        self.timeout = watchdog.timeout_seconds
        self.interval = max(0.1, min(5.0, self.timeout / 10))
        self.lost_at: float | None = None

    def run(self) -> None:
        """Beat, until told to stop or the rank has stood still for too long."""
        done, since, number = -1, time.monotonic(), 0
        while not self.stop.wait(self.interval):
            now = time.monotonic()
            number += 1
            before, (done, place) = done, self.watchdog.place()
            since = now if done != before else since
            beat = Beat(number, done, place, now - since)
            self._tell(beat, now)
            if beat.still >= self.timeout:
                self._end(beat)

    def _tell(self, beat: Beat, now: float) -> None:
        """Put a beat into the store; end the process when the store, which rank 0 or torchrun holds, stays away."""
        if self.store is None:
            return
        try:
            self.store.set(str(self.rank), json.dumps(beat))
            self.lost_at = None
        except RuntimeError:
            self.lost_at = self.lost_at or now
            if now - self.lost_at >= min(self.timeout, 60.0) and not self.stop.is_set():
                self._exit("the key-value store is gone, and with it rank 0 or the torchrun that holds it")

    def _end(self, own: Beat) -> None:
        """Name the culprit, if no other rank does so, and end this process."""
        if self.store is None:
            self._exit(f"this process has stood still for {own.still:.0f} s: {own.place}")
            return
        alone = f"the ranks stand still, this one for {own.still:.0f} s: {own.place}"
        # Across a link that was cut the store neither answers nor fails for a quarter of an hour.
        unanswered = threading.Timer(10 * self.interval + 5, self._exit, [alone])
        unanswered.daemon = True
        unanswered.start()
        try:
            first = self.store.add("judges", 1) == 1
            message = self._judge(own) if first else None
        except RuntimeError:
            first, message = True, alone
        if not first:
            self._beat_on(own, 8)  # while the other looks and speaks: when this rank ends, a launcher may end that one
        unanswered.cancel()
        self._exit(message)

    def _beat_on(self, own: Beat, times: int) -> None:
        """Let the others know for a while that this process lives, though its rank stands still."""
        for number in range(1, times + 1):
            self._tell(own._replace(number=own.number + number), time.monotonic())
            time.sleep(self.interval)

    def _judge(self, own: Beat) -> str:
        """Which rank hangs."""
        before = self._beats()
        self._beat_on(own, 4)
        after = self._beats()
        silent = [r for r in after if r != self.rank and (after[r] is None or after[r] == before[r])]
        if silent:
            names = ", ".join(map(str, silent[:8]))
            known = next((beat for beat in (after[r] for r in silent) if beat), None)
            where = f"; last heard of in {known.place}" if known else ""
            return f"rank {names} does not answer any more: stopped, or its host is gone{where}"
        beats = {rank: beat for rank, beat in after.items() if beat}
        behind = min(beats, key=lambda rank: beats[rank].done)
        others = max(beats, key=lambda rank: beats[rank].done)
        beat = beats[behind]
        if beats[others].done == beat.done:
            return f"all {self.num_ranks} ranks have stood still for {beat.still:.0f} s, in {beat.place}"
        return (
            f"rank {behind} hangs, for {beat.still:.0f} s, in {beat.place}; the others wait for it,"
            f" as rank {others} in {beats[others].place}"
        )

    def _beats(self) -> dict[int, Beat | None]:
        assert self.store is not None
        found: dict[int, Beat | None] = {}
        for rank in range(self.num_ranks):
            key = str(rank)
            found[rank] = Beat(*json.loads(self.store.get(key))) if self.store.check([key]) else None
        return found

    def _exit(self, message: str | None) -> None:
        """End this process, whose main thread does not answer, and those that it started."""
        if message:
            print(f"syncbn: error: {message} (watchdog.timeout_seconds={self.timeout:g})", file=sys.stderr, flush=True)
        if isinstance(self.launcher, _SubprocessScriptLauncher):
            for process in self.launcher.procs:
                process.kill()
        os._exit(FAILED)
