"""Runs a generator on P ranks and hands on what rank 0 yields: gloo, one thread each, a hard timeout.

Over loopback, or each rank on a host of its own (see `cable`).
"""

import contextlib
import datetime
import multiprocessing as mp
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from syncbn.benchmarks.harness.cable import Host

_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "syncbn"])


class RankFailed(RuntimeError):
    """A rank raised, died, or fell silent."""


def run_ranks(
    fn: Callable[..., Iterator[Any]], P: int, *args: Any, silence: float = 300, hosts: Sequence[Host] = ()
) -> Iterator[Any]:
    """Yields what `fn(rank, *args)` yields on rank 0, with the same running on all P ranks.

    Args:
        fn: a generator function of a module, so that it can be sent to other processes.
        P: how many.
        args: for fn.
        silence: how many seconds may pass without a result.
        hosts: where each rank runs; none: here.

    Raises:
        RankFailed: with the traceback of the rank that failed; all ranks are ended.
    """
    assert not hosts or len(hosts) == P
    folder = tempfile.TemporaryDirectory()
    meeting_point = str(Path(folder.name) / "store")
    pipes, processes = [], []
    for rank in range(P):
        ours, theirs = _context.Pipe()
        host = hosts[rank] if hosts else None
        arguments = (fn, rank, P, meeting_point, silence, host, theirs, args)
        processes.append(_context.Process(target=_rank_main, args=arguments, daemon=True))
        processes[-1].start()
        theirs.close()
        pipes.append(ours)
    try:
        yield from _results(pipes, silence)
    finally:
        for pipe in pipes:
            pipe.close()  # tells the rank to leave
        for process in processes:
            process.join(5)
            process.kill()
        folder.cleanup()


def _results(pipes: list[Connection], silence: float) -> Iterator[Any]:
    running, deadline = list(pipes), time.monotonic() + silence
    while running:
        ready = wait(running, max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankFailed(f"no result for {silence:.0f} s from rank(s) {[pipes.index(pipe) for pipe in running]}")
        for pipe in running[:]:
            if pipe not in ready:
                continue
            try:
                kind, value = pipe.recv()
            except EOFError:
                raise RankFailed(f"rank {pipes.index(pipe)} died") from None
            if kind == "error":
                raise RankFailed(f"rank {pipes.index(pipe)}:\n{value}")
            if kind == "done":
                running.remove(pipe)
            else:
                deadline = time.monotonic() + silence
                yield value


def _rank_main(
    fn: Callable,
    rank: int,
    P: int,
    meeting_point: str,
    silence: float,
    host: Host | None,
    pipe: Connection,
    args: tuple,
) -> None:
    torch.set_num_threads(1)
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(P)
    timeout = datetime.timedelta(seconds=silence)
    try:
        if host is not None:
            host.enter()
            os.environ["GLOO_SOCKET_IFNAME"] = host.device
        store = dist.FileStore(meeting_point, P)  # which hosts with a delay between them reach at once
        dist.init_process_group("gloo", store=store, rank=rank, world_size=P, timeout=timeout)
        for value in fn(rank, *args):
            if rank == 0:
                pipe.send(("value", value))
        pipe.send(("done", None))
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
    finally:
        with contextlib.suppress(EOFError):
            pipe.recv()  # leave together: the sockets must outlive the slowest rank
        os._exit(0)
