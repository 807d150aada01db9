"""Runs a generator on P ranks and hands on what rank 0 yields: gloo over loopback, one thread each, a hard timeout."""

import contextlib
import datetime
import multiprocessing as mp
import os
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist

_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "syncbn"])


class RankFailed(RuntimeError):
    """A rank raised, died, or fell silent."""


def run_ranks(fn: Callable[..., Iterator[Any]], P: int, *args: Any, silence: float = 300) -> Iterator[Any]:
    """Yields what `fn(rank, *args)` yields on rank 0, with the same running on all P ranks.

    Args:
        fn: a generator function of a module, so that it can be sent to other processes.
        P: how many.
        args: for fn.
        silence: how many seconds may pass without a result.

    Raises:
        RankFailed: with the traceback of the rank that failed; all ranks are ended.
    """
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, processes = [], []
    for rank in range(P):
        ours, theirs = _context.Pipe()
        arguments = (fn, rank, P, server.port, silence, theirs, args)
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


def _rank_main(fn: Callable, rank: int, P: int, port: int, silence: float, pipe: Connection, args: tuple) -> None:
    torch.set_num_threads(1)
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(P)
    timeout = datetime.timedelta(seconds=silence)
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)
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
