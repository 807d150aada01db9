"""Runs a function on several ranks of this machine."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from syncbn.experiments.recipe_runs import exit_on_sigterm

TIMEOUT = timedelta(minutes=10)


def run_on_ranks(function: Callable[..., None], ranks: int, *arguments: Any, progress: Callable[[int], None]) -> None:
    """Call ``function(rank, progress, *arguments)`` in a process for each rank, in one process group (gloo).

    Args:
        function: Of a module, so that it can be sent to other processes.
        ranks: How many.
        arguments: For the function.
        progress: Called here with the numbers that rank 0 gives to its ``progress``.

    Raises:
        ValueError: A rank failed; the others are ended. The message is that of the rank.
    """
    reached = torch.zeros(1, dtype=torch.int64).share_memory_()
    # This process keeps the store, at a port that the system chooses: two experiments do not meet.
    store = dist.TCPStore("127.0.0.1", 0, ranks, is_master=True, wait_for_workers=False)
    mp.get_context("forkserver").set_forkserver_preload([function.__module__])  # imported once, not by each rank
    processes = mp.start_processes(
        _rank_main, (ranks, store.port, reached, function, arguments), ranks, join=False, start_method="forkserver"
    )
    assert processes is not None
    try:
        with exit_on_sigterm():
            while not processes.join(timeout=1):
                progress(int(reached))
    except (mp.ProcessRaisedException, mp.ProcessExitedException) as error:
        raise ValueError(f"rank {error.error_index} of {ranks}: {str(error).strip().splitlines()[-1]}") from error
    finally:
        for process in processes.processes:
            process.kill()
    progress(int(reached))


def _rank_main(
    rank: int, ranks: int, port: int, reached: Tensor, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    def progress(value: int) -> None:
        if rank == 0:
            reached.fill_(value)

    torch.set_num_threads(1)
    with _process_group(rank, ranks, port):
        function(rank, progress, *arguments)


@contextmanager
def _process_group(rank: int, ranks: int, port: int) -> Iterator[None]:
    store = dist.TCPStore("127.0.0.1", port, ranks, is_master=False, timeout=TIMEOUT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)
    try:
        yield
    finally:
        dist.destroy_process_group()
