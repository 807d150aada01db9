"""Both sbatch scripts on a real SLURM of two nodes: to completion, through pre-emption and the loss of a node."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from runs import (
    EPOCH,
    STEPS,
    WORDS,
    check_finished,
    check_same_weights,
    checkout,
    environment,
    run_folders,
    steps_so_far,
    timeout,
)
from slurm import Slurm, slurm, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

SECONDS = 900.0  # for a job to end, on a busy machine
EDITS = {  # one rank on each node: the two processes of the main job
    "slurm_srun.sbatch": {
        "#SBATCH --time=": "30",
        "#SBATCH --ntasks-per-node=": "1",
        "#SBATCH --cpus-per-task=": "1",
    },
    "slurm_torchrun.sbatch": {
        "#SBATCH --time=": "30",
        "#SBATCH --gpus-per-node=": "1",
        "#SBATCH --cpus-per-task=": "1",
    },
}
SCRIPTS = tuple(EDITS)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    with slurm(tmp_path_factory.mktemp("slurm")) as made:
        made.environment |= environment() | {"PATH": made.environment["PATH"]}
        yield made


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing disturbs, on two ranks of one machine."""
    folder = checkout(tmp_path_factory.mktemp("reference"))
    started = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "syncbn"]
    done = subprocess.run(
        [*started, "fit", *WORDS], cwd=folder, env=environment(), capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr
    return run_folders(folder)[0]


class Job:
    """A script submitted from a checkout of its own."""

    def __init__(self, cluster: Slurm, folder: Path, script: str, *words: str, options: tuple[str, ...] = ()) -> None:
        self.cluster, self.folder = cluster, checkout(folder / "checkout", EDITS)
        self.number = cluster.submit(
            self.folder / "launch" / script, *WORDS, *timeout(60), *words, options=options, folder=self.folder
        )

    @property
    def log(self) -> str:
        """What the job has printed."""
        file = self.folder / f"slurm-syncbn-{self.number}.log"
        return file.read_text() if file.exists() else ""

    def wait_for_steps(self, number: int) -> None:
        """Until it has trained so far; fails where it ends before."""

        def trained() -> bool:
            state = self.cluster.job(self.number)["JobState"]
            assert state in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"), f"{state}\n{self.log}"
            return steps_so_far(self.folder) >= number

        wait_until(trained, SECONDS, f"step {number}")

    def check_completed(self, restarts: int) -> Path:
        """That it has ended well after so many requeues; the folder of its run."""
        job = self.cluster.wait_for(self.number, SECONDS)
        assert (job["JobState"], job["Restarts"]) == ("COMPLETED", str(restarts)), f"{job}\n{self.log}"
        return check_finished(self.folder, self.log)


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_trains_to_completion(cluster: Slurm, reference: Path, tmp_path: Path, script: str) -> None:
    job = Job(cluster, tmp_path, script)
    run = job.check_completed(restarts=0)
    check_same_weights(run, reference)


@pytest.mark.parametrize(
    ("script", "signal"),
    [("slurm_srun.sbatch", ("--signal=USR1",)), ("slurm_torchrun.sbatch", ("--signal=USR1", "--batch"))],
    ids=SCRIPTS,
)
def test_pre_emption_signal_requeues_and_resumes(
    cluster: Slurm, reference: Path, tmp_path: Path, script: str, signal: tuple[str, ...]
) -> None:
    """The signal as `#SBATCH --signal` has it sent, to the ranks or to the batch shell, in the middle of an epoch."""
    job = Job(cluster, tmp_path, script)
    job.wait_for_steps(5)
    cluster.run("scancel", *signal, job.number)
    wait_until(lambda: cluster.job(job.number)["Restarts"] == "1", SECONDS, "the job is requeued")
    assert steps_so_far(job.folder) < STEPS
    check_same_weights(job.check_completed(restarts=1), reference)


def test_requeue_by_the_scheduler_resumes(cluster: Slurm, reference: Path, tmp_path: Path) -> None:
    """What SLURM does when it pre-empts: SIGTERM, and back to the queue."""
    job = Job(cluster, tmp_path, "slurm_srun.sbatch")
    job.wait_for_steps(5)
    cluster.run("scontrol", "requeue", job.number)
    check_same_weights(job.check_completed(restarts=1), reference)


@pytest.mark.parametrize("script", SCRIPTS)
def test_pre_emption_by_an_urgent_job_resumes(cluster: Slurm, reference: Path, tmp_path: Path, script: str) -> None:
    """SIGTERM to the ranks, and a time of grace that they do not need."""
    job = Job(cluster, tmp_path, script)
    job.wait_for_steps(5)
    urgent = tmp_path / "urgent.sh"
    urgent.write_text("#!/bin/sh\nsleep 5\n")
    number = cluster.submit(urgent, options=("--partition=urgent", "--nodes=2", "--exclusive"), folder=tmp_path)
    assert cluster.wait_for(number, SECONDS)["JobState"] == "COMPLETED"
    assert steps_so_far(job.folder) < STEPS
    check_same_weights(job.check_completed(restarts=1), reference)


@pytest.mark.parametrize("script", SCRIPTS)
def test_power_cut_of_a_node_requeues_and_resumes(cluster: Slurm, reference: Path, tmp_path: Path, script: str) -> None:
    job = Job(cluster, tmp_path, script)
    job.wait_for_steps(EPOCH + 5)  # the first epoch has ended, and with it a checkpoint been written
    cluster.net["node2"].power_off()
    wait_until(lambda: cluster.job(job.number)["Restarts"] == "1", SECONDS, "SLURM misses the node")
    cluster.net.power_on("node2")
    cluster.start_node("node2")
    check_same_weights(job.check_completed(restarts=1), reference)


def test_rank_that_dies_ends_the_job(cluster: Slurm, tmp_path: Path) -> None:
    job = Job(cluster, tmp_path, "slurm_srun.sbatch")
    job.wait_for_steps(2)
    cluster.net["node2"].run("pkill", "--signal", "KILL", "--full", "bin/syncbn fit")  # sees that host alone
    ended = cluster.wait_for(job.number, 120)
    assert (ended["JobState"], ended["Restarts"]) == ("FAILED", "0")
    assert "Killed" in job.log


@pytest.mark.parametrize(
    ("script", "options", "words", "message"),
    [
        ("slurm_srun.sbatch", ("--ntasks=3", "--ntasks-per-node=2"), (), "3 tasks"),
        ("slurm_srun.sbatch", ("--nodes=1",), ("--trainer.num_nodes", "2"), "num_nodes"),
        ("slurm_srun.sbatch", (), ("--trainer.devices", "2"), "devices"),
        ("slurm_torchrun.sbatch", ("--nodes=1",), ("--trainer.num_nodes", "2"), "num_nodes"),
    ],
    ids=["ntasks", "nodes", "devices", "torchrun-nodes"],
)
def test_doctor_stops_a_job_of_another_size_than_the_config(
    cluster: Slurm, tmp_path: Path, script: str, options: tuple[str, ...], words: tuple[str, ...], message: str
) -> None:
    job = Job(cluster, tmp_path, script, *words, options=options)
    assert cluster.wait_for(job.number, SECONDS)["JobState"] == "FAILED"
    assert message in job.log
    assert not run_folders(job.folder)  # nothing was trained
