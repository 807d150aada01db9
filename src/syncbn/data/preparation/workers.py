"""Processes that work on a source, and the bar that shows how far they are."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from typing import TypeVar

from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from syncbn.progress import progress

Input = TypeVar("Input")
Output = TypeVar("Output")


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def worker_pool(workers: int | None) -> Iterator[ProcessPoolExecutor]:
    """Processes to work with; on an error or interrupt what has not begun is not begun any more.

    Args:
        workers: How many; None for all cores.

    Raises:
        ValueError: ``workers`` is less than 1, or one of them was killed.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers={workers} must be at least 1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["syncbn.data.preparation.job"])  # imported once, not by every worker
    pool = ProcessPoolExecutor(workers or available_cores(), mp_context=context, initializer=_start_worker)
    try:
        yield pool
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker was killed, perhaps for want of memory: run the same command again with fewer --workers;"
            " finished shards are kept"
        ) from error
    except KeyboardInterrupt:
        print("interrupted: the shards in hand are ended; the same command goes on from there", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end with it should it be killed: an orphan would wait, or write, for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def finished(
    pool: ProcessPoolExecutor, function: Callable[..., Output], inputs: Iterable[Input], *arguments: object
) -> Iterator[tuple[Input, Output]]:
    """Each input with ``function(input, *arguments)``, as they get done, in any order."""
    futures: dict[Future[Output], Input] = {pool.submit(function, item, *arguments): item for item in inputs}
    for future in as_completed(futures):
        yield futures.pop(future), future.result()


class RateColumn(ProgressColumn):
    """How many images (or whatever is counted) get done in a second."""

    def render(self, task: Task) -> Text:
        """Blank before the first are done."""
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f}/s" if speed else "")


def progress_bar() -> Progress:
    """A bar with count, rate and time left; where there is no terminal, lines."""
    return progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), RateColumn(), TimeRemainingColumn()
    )
