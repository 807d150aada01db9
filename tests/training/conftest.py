"""Warnings of Lightning's that are its own business, and how tests start commands and workers."""

import json
import os
import runpy
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from ranks import fork, under_torchrun

IGNORED = (
    "ignore:.*isinstance.treespec, LeafSpec.:FutureWarning",
    "ignore:.*isinstance.treespec, LeafSpec.:DeprecationWarning",
    "ignore:The .srun. command is available:UserWarning",  # wherever SLURM is installed
    "ignore:.*does not have many workers:UserWarning",
    "ignore:.*Grad strides do not match bucket view strides:UserWarning",
    "ignore:The `srun` command is available on your system but is not used:UserWarning",
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",  # DeepSpeed's, as it is imported
)


def pytest_configure(config: pytest.Config) -> None:
    for line in IGNORED:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture(autouse=True)
def untouched_environment() -> Iterator[None]:
    """Lightning leaves seeds, addresses and its process group behind; the next test starts without them."""
    before, words = dict(os.environ), list(sys.argv)
    os.environ["OMP_NUM_THREADS"] = "1"  # or Lightning would set as many threads as there are cores
    yield
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)
    sys.argv[:] = words


def _work(worker: Path, variables: dict[str, str], output: Path) -> None:
    os.environ.update(variables)
    os.chdir(output.parent)
    sys.argv[:] = [str(worker), variables["WORLD_SIZE"], str(output)]
    sys.path.insert(0, str(worker.parent))
    runpy.run_path(str(worker), run_name="__main__")
    os._exit(0)


def result_of_worker(worker: Path, ranks: int, folder: Path) -> Any:
    """What a script that trains on so many ranks writes as JSON to a file in the folder."""
    output = folder / f"{ranks}.json"
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [fork(_work, worker, under_torchrun(rank, ranks, store), output) for rank in range(ranks)]
    deadline = time.monotonic() + 120
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    found = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    assert found == [0] * ranks, "its errors are above"
    return json.loads(output.read_text())
