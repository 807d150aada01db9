"""The process group of a run that torchrun starts again."""

import atexit
import os
from datetime import timedelta

import torch.distributed as dist
from lightning.fabric.utilities.distributed import _destroy_dist_connection
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from syncbn.training.launch.launchers import agent_keeps_store, attempt_of


def join_attempt(strategy: DDPStrategy | ModelParallelStrategy, timeout: timedelta | None) -> None:
    """Form the process group under keys of this attempt of torchrun; Lightning then finds it.

    The store of torchrun's agent may outlive a worker (torch 2.13, with ``--standalone`` or ``--master-port``), and
    with it the addresses of ranks that are dead: ranks of the next attempt would connect to these. Other launchers
    start a store with each attempt, and nothing is done here.

    Args:
        strategy: Whose backend and devices they are; before it has set up the process group itself.
        timeout: Of a collective.
    """
    if not agent_keeps_store(os.environ) or dist.is_initialized():
        return
    environment = strategy.cluster_environment
    assert environment is not None
    timeout = timeout or dist.distributed_c10d.default_pg_timeout
    agent = dist.TCPStore(environment.main_address, environment.main_port, is_master=False, timeout=timeout)
    backend = strategy._get_process_group_backend()
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(f"attempt_{attempt_of(os.environ)}", agent),
        rank=environment.global_rank(),
        world_size=environment.world_size(),
        device_id=None if strategy.root_device.type == "cpu" else strategy.root_device,
        timeout=timeout,
    )
    if backend == "nccl":
        atexit.register(_destroy_dist_connection)
