"""The programs in examples/: on two processes they print what they print on one."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def losses(example: str, processes: int) -> list[float]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    finished = subprocess.run(
        [sys.executable, *launch, str(EXAMPLES / example)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    assert "Warning" not in finished.stderr
    return [float(loss) for loss in re.findall(r"step \d: loss (\S+)", finished.stdout)]


@pytest.mark.parametrize("example", ["plain_ddp.py", "accelerate_loop.py"])
def test_any_number_of_processes_prints_the_same(example):
    if example.startswith("accelerate") and find_spec("accelerate") is None:
        pytest.skip("accelerate is not installed")
    alone, together = losses(example, 1), losses(example, 2)
    assert len(alone) == 5 and len(set(alone)) == 5
    assert together == pytest.approx(alone, abs=2e-5)
