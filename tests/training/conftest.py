"""Warnings of Lightning's that are its own business, and the environment of commands that tests start."""

import os
import sys
from collections.abc import Iterator

import pytest
import torch.distributed as dist

IGNORED = (
    "ignore:.*isinstance.treespec, LeafSpec.:FutureWarning",
    "ignore:.*isinstance.treespec, LeafSpec.:DeprecationWarning",
    "ignore:.*does not have many workers:UserWarning",
    "ignore:.*Grad strides do not match bucket view strides:UserWarning",
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
