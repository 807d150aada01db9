"""Ranks do not outlive the command that started them."""

import os
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path

from syncbn.experiments.rank_processes import run_on_ranks


def sleep(rank: int, progress: Callable[[int], None], folder: Path) -> None:
    (folder / f"{rank}.part").write_text(str(os.getpid()))
    (folder / f"{rank}.part").rename(folder / f"{rank}.pid")
    time.sleep(600)


def start(folder: Path) -> None:
    run_on_ranks(sleep, 2, folder, progress=lambda step: None)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ranks_end_with_a_command_that_is_terminated(tmp_path):
    process = get_context("forkserver").Process(target=start, args=(tmp_path,))
    process.start()
    files = [tmp_path / f"{rank}.pid" for rank in range(2)]
    wait_for(lambda: all(file.is_file() for file in files))
    process.terminate()
    process.join()
    pids = [int(file.read_text()) for file in files]
    wait_for(lambda: not any(map(is_running, pids)))
