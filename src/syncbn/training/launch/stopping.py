"""Signals that ask a training to stop: noted here, acted on between two steps (see `Checkpointing`)."""

import os
import signal
import subprocess
import sys
import threading
from types import FrameType
from typing import Any

import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment

STOPPED = 75
"""Exit status of a training that a signal stopped and that can go on: EX_TEMPFAIL of sysexits.h, "try again"."""


INTERRUPTED = 128 + signal.SIGINT
"""Exit status of a training that Ctrl-C stopped, as shells have it."""


class StopSignals:
    """Notes Ctrl-C, SIGTERM, SIGUSR1 and the requeue signal of SLURM, instead of what they would do.

    A second Ctrl-C does what it always does.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._is_global_zero = False

    def install(self, trainer: Trainer) -> None:
        """Note signals from now on. Lightning's handlers, installed later, are replaced by calling this again."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._is_global_zero = trainer.is_global_zero
        for number in {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, requeue_signal(trainer) or signal.SIGUSR1}:
            before = signal.signal(number, self._note)
            self._before.setdefault(number, before)

    def remove(self) -> None:
        """Put back what was there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if self._is_global_zero:  # print might be interrupted in the middle of a print
                os.write(2, b"\nsyncbn: stops after this step, with a checkpoint; Ctrl-C once more ends at once\n")


def requeue_signal(trainer: Trainer) -> signal.Signals | None:
    """The signal after which a job is to be requeued by its own processes, None for none."""
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
        return environment.requeue_signal
    return None


def requeue_job() -> None:
    """Ask SLURM to start this job again; a refusal is printed."""
    job = os.environ["SLURM_JOB_ID"]  # of an array, that of this task
    asked = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=60)
    if asked.returncode:
        print(f"syncbn: SLURM did not requeue job {job}: {asked.stderr.strip()}", file=sys.stderr, flush=True)


def exit_status(trainer: Trainer, interrupted: bool) -> int:
    """With which status this process stops: `INTERRUPTED`, `STOPPED`, or 0 of those that Lightning's launcher started.

    That launcher takes any other status of its processes for a crash, and kills the first one.
    """
    environment = trainer._accelerator_connector.cluster_environment
    if isinstance(environment, LightningEnvironment) and trainer.local_rank > 0:
        return 0
    return INTERRUPTED if interrupted else STOPPED


def describe_lost_rank(error: RuntimeError) -> str:
    """In one line, that this rank stopped because it lost another; "" of an error of another kind."""
    reason = " ".join(str(error).split())
    kinds = ("/gloo/", "all-reduce of a BatchNorm layer failed")
    if not isinstance(error, dist.DistError) and not any(kind in reason for kind in kinds):
        return ""
    if "EADDRINUSE" in reason:
        return (
            f"the port that the ranks are to meet at is taken, perhaps by another job on this machine: {reason[:400]};"
            " name another one (MASTER_PORT, or torchrun's --master-port)"
        )
    return f"lost the connection to another rank, which died or hangs; what it said comes first: {reason[:400]}"
