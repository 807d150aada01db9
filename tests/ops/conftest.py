"""What tests of kernels under Triton's interpreter share."""

import pytest
import torch

from syncbn.ops import triton_passes


@pytest.fixture(autouse=True)
def fresh_memory_is_not_a_number():
    torch.use_deterministic_algorithms(True)  # under which torch fills it
    assert torch.empty(2).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def many_programs(monkeypatch):
    """As on a GPU of some multiprocessors, whose programs' sums must be merged."""
    monkeypatch.setattr(triton_passes, "_multiprocessors", lambda device: 5)
