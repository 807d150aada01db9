"""A process that has trained ends well: gloo's threads must not be the last to hold what the layers have sent."""

import os
import subprocess
import sys
from pathlib import Path

SLOW_GLOO = Path(__file__).parent / "slow_gloo.c"

LOOP = """
import torch, torch.distributed as dist, syncbn
dist.init_process_group("gloo")
net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), syncbn.SyncBatchNorm(8))
ddp = torch.nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
for _ in range(3):
    ddp(torch.randn(4, 3, 8, 8)).sum().backward()
dist.destroy_process_group()
"""


def test_an_exit_right_after_a_backward_is_no_abort(tmp_path):
    slow_gloo = tmp_path / "slow_gloo.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", slow_gloo, SLOW_GLOO, "-ldl"], check=True, timeout=60)
    (tmp_path / "loop.py").write_text(LOOP)
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "loop.py"]
    ended = subprocess.run(
        [sys.executable, *launch],
        cwd=tmp_path,
        env=os.environ | {"LD_PRELOAD": str(slow_gloo), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "slow gloo" in ended.stderr
    assert ended.returncode == 0, ended.stderr
