"""This process among the ranks; and how the others end, which rank 0 started by Lightning's launcher."""

import signal
import time
from typing import Any

from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities import rank_zero_only


def is_rank_zero() -> bool:
    """Whether this process is the first rank, as far as the launcher has said."""
    return getattr(rank_zero_only, "rank", 0) == 0


def wait_for_other_ranks(launcher: Any) -> None:
    """Wait for the processes that this one started: they print nothing after its last line."""
    for process in getattr(launcher, "procs", []):
        process.wait(timeout=60)


def stop_other_ranks(launcher: Any, error: BaseException) -> None:
    """End the processes that this one started, whose next collective would wait in vain.

    Raises:
        ValueError: One of them had ended by itself in an error, of which ``error`` is but the consequence.
    """
    if not isinstance(launcher, _SubprocessScriptLauncher):
        return
    failed = None
    if isinstance(error, RuntimeError):
        failed = first_failed_rank(launcher, seconds=3.0)
    launcher.kill(signal.SIGKILL)  # on SIGTERM Lightning would first wait for the other ranks
    if failed is not None:
        raise ValueError(f"rank {failed} stopped with an error, see above") from error


def first_failed_rank(launcher: _SubprocessScriptLauncher, seconds: float) -> int | None:
    """Local rank of a started process that ended in an error within some seconds, or None."""
    deadline = time.monotonic() + seconds
    while launcher.procs and time.monotonic() < deadline:
        for rank, process in enumerate(launcher.procs, start=1):
            if process.poll():
                return rank
        time.sleep(0.1)
    return None
