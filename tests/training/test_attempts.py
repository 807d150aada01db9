"""Ranks that torchrun starts again meet each other, not what the dead ones left in its store."""

import datetime
import os
import subprocess
import sys

import torch.distributed as dist

RANK = """
import os, sys
from datetime import timedelta
import torch
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from syncbn.training import SynchronisedDDPStrategy

strategy = SynchronisedDDPStrategy(timeout_seconds=20, process_group_backend="gloo")
strategy.cluster_environment = TorchElasticEnvironment()
strategy.parallel_devices = [torch.device("cpu")] * 2
strategy.setup_distributed()
ones = torch.ones(1)
torch.distributed.all_reduce(ones)
assert ones == 2
sys.stdout.flush()
os._exit(0)  # as a rank that is killed: it takes nothing back
"""


def test_two_attempts_in_one_store():
    agent = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=20)
    )
    for attempt in range(2):
        ranks = []
        for rank in range(2):
            variables = {
                **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(agent.port), "OMP_NUM_THREADS": "1"},
                **{"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": "2"},
                **{"LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "run", "TORCHELASTIC_USE_AGENT_STORE": "True"},
                "TORCHELASTIC_RESTART_COUNT": str(attempt),
            }
            command = [sys.executable, "-c", RANK]
            ranks.append(subprocess.Popen(command, env=os.environ | variables, stderr=subprocess.PIPE, text=True))
        for process in ranks:
            _, said = process.communicate(timeout=90)
            assert process.returncode == 0, said
