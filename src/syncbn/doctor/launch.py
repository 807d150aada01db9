"""Finds out which launcher started this process, and as which rank: the way Lightning does, but without its checks.

Those raise at the first contradiction; the doctor is to report all of them.
"""

import os
import socket

from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch import Trainer

from syncbn.doctor.facts import Placement

FIRST_SLURM_PORT = 15000
"""Lightning's port in a SLURM job: this and the last four digits of the job's number."""


def placement_by_environment() -> Placement | None:
    """The place that torchrun or srun gave this process; None where neither started it.

    As in Lightning, torchrun comes first: it may itself have been started by srun.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return _placement("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "127.0.0.1", 29500)
    interactive = os.environ.get("SLURM_JOB_NAME") in ("bash", "interactive")
    if "SLURM_NTASKS" in os.environ and not interactive:
        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_NODELIST", "127.0.0.1")
        # As Lightning names it, without MASTER_ADDR: wrongly for a list such as r1i[0-1]n[0-3], as the fit would, too.
        first = SLURMEnvironment.resolve_root_node_address(nodes)
        port = FIRST_SLURM_PORT + int(os.environ.get("SLURM_JOB_ID", "0")[-4:])
        # The tasks that srun really started, which may be others than those allocated.
        tasks = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in os.environ else "SLURM_NTASKS"
        return _placement("slurm", "SLURM_PROCID", tasks, "SLURM_LOCALID", first, port)
    return None


def _placement(launcher: str, rank: str, world_size: str, local_rank: str, address: str, port: int) -> Placement:
    number = {name: int(os.environ.get(name, "0")) for name in (rank, world_size, local_rank)}
    return Placement(
        launcher,
        number[rank],
        number[world_size],
        number[local_rank],
        socket.gethostname(),
        os.environ.get("MASTER_ADDR", address),
        int(os.environ.get("MASTER_PORT", port)),
    )


def placement_by_lightning(trainer: Trainer | None) -> Placement:
    """The place of a process of Lightning's own launcher, once that has run; without a trainer, one process."""
    rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
    return Placement(
        "lightning",
        rank,
        world_size,
        int(os.environ.get("LOCAL_RANK", "0")),
        socket.gethostname(),
        os.environ.get("MASTER_ADDR", "127.0.0.1"),
        int(os.environ.get("MASTER_PORT", "0")),  # 0 has rank 0 choose a free one, for itself alone
    )
