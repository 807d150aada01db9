"""Ranks that torchrun starts again meet each other, not what the dead ones left in its store."""

import datetime
import os

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import TorchElasticEnvironment

from ranks import fork, under_torchrun
from syncbn.training import SynchronisedDDPStrategy


def meet(variables: dict[str, str]) -> None:
    """What a rank does, from its start to its being killed: it takes nothing back."""
    torch.set_num_threads(1)
    os.environ.update(variables)
    strategy = SynchronisedDDPStrategy(timeout_seconds=20, process_group_backend="gloo")
    strategy.cluster_environment = TorchElasticEnvironment()
    strategy.parallel_devices = [torch.device("cpu")] * 2
    strategy.setup_distributed()
    ones = torch.ones(1)
    dist.all_reduce(ones)
    assert ones == 2
    os._exit(0)


def test_two_attempts_in_one_store():
    agent = dist.TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=datetime.timedelta(seconds=20)
    )
    for attempt in range(2):
        ranks = []
        for rank in range(2):
            variables = under_torchrun(rank, 2, agent) | {"TORCHELASTIC_RESTART_COUNT": str(attempt)}
            ranks.append(fork(meet, variables))
        for process in ranks:
            process.join(timeout=90)
            assert process.exitcode == 0
