"""Warnings of Lightning's that are its own business, and how tests start commands and workers."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

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


def result_of_worker(worker: Path, ranks: int, folder: Path) -> Any:
    """What a script that trains on so many ranks writes as JSON to a file in the folder."""
    output = folder / f"{ranks}.json"
    finished = subprocess.run(
        [sys.executable, str(worker), str(ranks), str(output)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(output.read_text())
