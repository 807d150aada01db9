"""Shared by all tests: one thread, so that ranks do not fight for cores; a folder to run commands in; float64."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What was imported stays: neither the collector nor the search for layers' names need look through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def float64() -> Iterator[None]:
    """New layers and tensors are float64: what should be equal is, to 1e-7 and on any machine."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder of the test's own to run in; words and environment are put back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["syncbn"])
    before = dict(os.environ)
    os.environ["OMP_NUM_THREADS"] = "1"  # or Lightning would set as many threads as there are cores
    yield
    os.environ.clear()
    os.environ.update(before)
