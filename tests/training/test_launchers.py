"""devices and num_nodes of a run follow from torchrun, srun or DeepSpeed's launcher."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from syncbn.training.launch.launchers import follow_launcher
from syncbn.training.launch.stopping import describe_lost_rank

TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
SRUN = {"SLURM_NTASKS": "8", "SLURM_NTASKS_PER_NODE": "4", "SLURM_NNODES": "2", "SLURM_STEP_ID": "0"}
DEEPSPEED = {"WORLD_SIZE": "8", "LOCAL_SIZE": "4", "CROSS_RANK": "1", "CROSS_SIZE": "2"}


@pytest.mark.parametrize("environment", [TORCHRUN, SRUN, DEEPSPEED], ids=["torchrun", "srun", "deepspeed"])
def test_launcher_decides_unless_the_command_line_says_so(environment: dict[str, str]) -> None:
    environment = dict(environment)
    assert follow_launcher(["syncbn", "fit"], environment) == {"devices": 4, "num_nodes": 2}
    assert follow_launcher(["syncbn", "fit", "--trainer.devices=2"], environment) == {"num_nodes": 2}
    assert follow_launcher(["syncbn", "fit", "--trainer.num_nodes", "1"], environment) == {"devices": 4}


def test_deepspeeds_number_of_the_node_is_handed_to_lightning() -> None:
    environment = dict(DEEPSPEED)
    follow_launcher([], environment)
    assert environment["NODE_RANK"] == "1"


@pytest.mark.parametrize(
    "environment",
    [
        {},
        SRUN | {"SLURM_JOB_NAME": "interactive"},
        {"SLURM_JOB_ID": "7", "SLURM_NNODES": "1"},  # a batch script of one process, without srun
    ],
    ids=["alone", "interactive", "batch"],
)
def test_without_a_launcher_the_config_decides(environment: dict[str, str]) -> None:
    assert follow_launcher([], environment) == {}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (SRUN | {"SLURM_NTASKS": "7"}, "--ntasks=7 does not fit --ntasks-per-node=4"),
        ({"SLURM_NTASKS": "8", "SLURM_NNODES": "2", "SLURM_STEP_ID": "0"}, "--ntasks-per-node=4 instead of --ntasks"),
        ({name: value for name, value in SRUN.items() if name != "SLURM_STEP_ID"}, "start it by srun"),
        (TORCHRUN | {"WORLD_SIZE": "6"}, "6 processes, 4 of them on this node"),
    ],
    ids=["other ntasks", "ntasks alone", "no srun", "uneven"],
)
def test_launches_that_would_leave_ranks_out_are_refused(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        follow_launcher([], environment)


def test_torchrun_starts_another_number_of_ranks_than_the_config_has(tmp_path: Path) -> None:
    config = Path(__file__).parents[2] / "configs" / "fashion_mnist.yaml"
    words = ["fit", "--config", str(config), "--trainer.fast_dev_run", "true", "--global_batch_size", "4"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "-m", "syncbn", *words],
        cwd=tmp_path,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    assert "global batch 4 = 1 rank x 4" in done.stdout


def test_a_port_that_is_taken_is_not_a_rank_that_died() -> None:
    described = describe_lost_rank(torch.distributed.DistNetworkError("port: 29500, code: -98, name: EADDRINUSE"))
    assert described.startswith("the port that the ranks are to meet at is taken") and "MASTER_PORT" in described
    assert describe_lost_rank(torch.distributed.DistNetworkError("reset")).startswith("lost the connection")
