"""Runs a function on P ranks: gloo over loopback, one thread each, a hard timeout, results and errors collected."""

import contextlib
import datetime
import gc
import multiprocessing as mp
import os
import time
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

_context = mp.get_context("forkserver")


def _start_server() -> None:
    """The process that the ranks are forked from: where it is not running yet."""
    _context.set_forkserver_preload(["rank_preload"])  # which it looks for on its own path, and skips in silence
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        forkserver.ensure_running()


def fork(fn: Callable, *args: Any) -> mp.process.BaseProcess:
    """Start fn(*args) in a process of its own, where torch and syncbn.training are imported already."""
    _start_server()
    process = _context.Process(target=fn, args=args, daemon=True)
    process.start()
    return process


def under_torchrun(rank: int, P: int, store: dist.TCPStore) -> dict[str, str]:
    """The environment that torchrun gives a rank of one host, with its agent's store."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": P, "LOCAL_WORLD_SIZE": P}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": store.port, "OMP_NUM_THREADS": 1}
    names |= {"TORCHELASTIC_RUN_ID": "run", "TORCHELASTIC_USE_AGENT_STORE": True}
    return {name: str(value) for name, value in names.items()}


class RankError(AssertionError):
    """A rank raised; `.errors` maps the rank to (type name, message)."""

    def __init__(self, errors: dict[int, tuple[str, str, str]]) -> None:
        self.errors = {rank: (kind, text) for rank, (kind, text, _) in errors.items()}
        super().__init__("\n".join(f"--- rank {r}\n{trace}" for r, (_, _, trace) in sorted(errors.items())))


def _rank_main(fn: Callable, rank: int, P: int, port: int, seconds: float, pipe: Connection, args: tuple) -> None:
    assert gc.get_freeze_count(), "the server has not imported rank_preload"
    torch.set_num_threads(1)
    os.environ["RANK"], os.environ["WORLD_SIZE"] = str(rank), str(P)
    timeout = datetime.timedelta(seconds=seconds)
    try:
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=P, timeout=timeout)
        pipe.send(("ok", fn(rank, *args)))
    except BaseException as error:
        pipe.send(("error", (type(error).__name__, str(error), traceback.format_exc())))
    finally:
        pipe.recv()  # leave together: the store and the sockets must outlive the slowest rank
        os._exit(0)


def run_ranks(fn: Callable, P: int, *args: Any, timeout: float = 60, group_timeout: float = 20) -> list[Any]:
    """[fn(0, *args), ..., fn(P-1, *args)], each in its own process inside an initialised world of P ranks.

    Raises:
        RankError: some ranks raised, died or did not return within `timeout` seconds.
    """
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes, processes = [], []
    for rank in range(P):
        ours, theirs = _context.Pipe()
        processes.append(fork(_rank_main, fn, rank, P, server.port, group_timeout, theirs, args))
        theirs.close()
        pipes.append(ours)
    try:
        return _collect(pipes, timeout)
    finally:
        for pipe in pipes:
            with contextlib.suppress(OSError):
                pipe.send("leave")
        for process in processes:
            process.join(5)
            process.kill()


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    deadline = time.monotonic() + timeout
    results, errors = {}, {}
    for rank, pipe in enumerate(pipes):
        try:
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                errors[rank] = ("Hang", f"no result within {timeout} s", f"no result within {timeout} s")
                continue
            status, value = pipe.recv()
        except EOFError:
            errors[rank] = ("Died", "the process died", "the process died")
            continue
        if status == "ok":
            results[rank] = value
        else:
            errors[rank] = value
    if errors:
        raise RankError(errors)
    return [results[rank] for rank in range(len(pipes))]
