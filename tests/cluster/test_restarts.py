"""Real launchers, real kills: ranks die at random moments, hang and are told to stop; runs recover or say why not."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from run_results import learned, same
from syncbn.training.checkpoints.files import by_step
from syncbn.training.launch.stopping import STOPPED

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(7200)]
KILLS, MAX_RESTARTS = 20, 3
SEED = int(os.environ.get("SYNCBN_TEST_SEED", "0"))  # of the moments and the victims
FIT = [
    *("fit", "--name=run", "--data.image_size=8", "--data.validation_images=9200", "--global_batch_size=8"),
    *("--model.stem=small", "--model.width_multiplier=0.125", "--model.dropout=0.3", "--test_after_fit=false"),
    *("--data.augmentation.mirror_probability=0.5", "--trainer.accumulate_grad_batches=2"),
    "--trainer.callbacks+=syncbn.training.PolyakAveraging",
    *("--trainer.max_epochs=2", "--trainer.devices=2", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1"),
    *("--trainer.limit_val_batches=4", "--trainer.enable_progress_bar=false", "--checkpointing.every_n_steps=10"),
]
"""200 steps on two ranks, with dropout, augmentation, accumulation and averaged weights."""
TORCHRUN = [
    *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--monitor-interval=0.5"),
    *(f"--max-restarts={MAX_RESTARTS}", "-m", "syncbn", *FIT),
]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "GLOO_SOCKET_IFNAME": "lo"}


@contextmanager
def started(words: list[str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command in a folder of its own, with its output in the file ``log``; all of it is gone afterwards."""
    folder.mkdir(exist_ok=True)
    environment = os.environ | ENVIRONMENT | {"MASTER_ADDR": "127.0.0.1"}
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(words, env=environment, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    try:
        yield process
    finally:
        for pid in [*children(process.pid), process.pid]:
            if process.poll() is None or pid != process.pid:
                os.kill(pid, signal.SIGKILL)
        process.wait(60)


def children(parent: int) -> list[int]:
    """The processes that a process has started and that live."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, ppid = status.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # gone meanwhile
            continue
        if int(ppid) == parent and state != "Z":
            found.append(int(status.parent.name))
    return found


def wait_for(condition, process: subprocess.Popen[bytes], seconds: float) -> None:
    """Wait for something that a process does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)


def checkpoints(folder: Path) -> list[Path]:
    return by_step(folder / "runs" / "run" / "version_0" / "checkpoints")


def result(folder: Path) -> tuple[dict, list]:
    """What a run leaves: its last checkpoint without the paths in it, and its log."""
    run = folder / "runs" / "run" / "version_0"
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    kept = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers", "global_step")
    return {name: checkpoint[name] for name in kept}, learned(run)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[tuple[dict, list], float]:
    """What a run leaves that nothing disturbed, and how many seconds it took."""
    folder = tmp_path_factory.mktemp("undisturbed")
    begun = time.monotonic()
    with started(TORCHRUN, folder) as process:
        assert process.wait(1200) == 0, (folder / "log").read_text()
    return result(folder), time.monotonic() - begun


def test_twenty_kills_at_random_moments(tmp_path, undisturbed):
    expected, seconds = undisturbed
    moments = random.Random(SEED)
    kills = runs = 0
    while kills < KILLS:
        folder = tmp_path / str(runs)
        runs += 1
        with started(TORCHRUN, folder) as process:
            for _ in range(min(MAX_RESTARTS, KILLS - kills)):
                wait_for(lambda process=process: len(children(process.pid)) == 2, process, 120)
                ranks = children(process.pid)
                try:
                    process.wait(moments.uniform(0, seconds))
                    break  # it was faster
                except subprocess.TimeoutExpired:
                    victim = moments.choice(ranks)
                if victim not in children(process.pid):
                    break
                os.kill(victim, signal.SIGKILL)
                kills += 1
                wait_for(lambda p=process, r=ranks: not set(children(p.pid)) & set(r), process, 120)
            assert process.wait(3 * seconds + 300) == 0, (folder / "log").read_text()[-5000:]
        assert same(result(folder), expected), f"run {runs} after {kills} kills"
    print(f"{kills} kills in {runs} runs, all bitwise equal to the undisturbed run")


def test_a_rank_that_is_frozen_is_named_and_the_run_ends(tmp_path):
    """By Lightning's launcher; a stopped process answers nobody, and only its silence tells."""
    with started([sys.executable, "-m", "syncbn", *FIT, "--watchdog.timeout_seconds=20"], tmp_path) as process:
        wait_for(lambda: checkpoints(tmp_path), process, 600)
        (rank_1,) = children(process.pid)
        os.kill(rank_1, signal.SIGSTOP)
        frozen = time.monotonic()
        assert process.wait(300) == 1
        assert 15 < time.monotonic() - frozen < 120
    errors = [line for line in (tmp_path / "log").read_text().splitlines() if line.startswith("syncbn: error")]
    assert len(errors) == 1
    assert re.match(r"syncbn: error: rank 1 does not answer any more.*last heard of in .*step \d+.*layer", errors[0])


def test_one_rank_told_to_stop_stops_all_of_them(tmp_path, undisturbed):
    """The signal goes to rank 1 alone; what is gone on with by hand ends like the undisturbed run."""
    words = [sys.executable, "-m", "syncbn", *FIT]
    with started(words, tmp_path) as process:
        wait_for(lambda: checkpoints(tmp_path), process, 600)
        (rank_1,) = children(process.pid)
        os.kill(rank_1, signal.SIGUSR1)
        assert process.wait(300) == STOPPED
    steps = int(re.search(r"stopped by a signal after (\d+) steps", (tmp_path / "log").read_text())[1])
    assert checkpoints(tmp_path)[0].name == f"step={steps}.ckpt"
    with started([*words, "--resume=runs/run/version_0"], tmp_path) as process:
        assert process.wait(1200) == 0, (tmp_path / "log").read_text()[-5000:]
    assert same(result(tmp_path), undisturbed[0])


def test_a_rank_that_is_killed_ends_the_run_in_one_line(tmp_path):
    """By Lightning's launcher, which restarts nothing."""
    with started([sys.executable, "-m", "syncbn", *FIT], tmp_path) as process:
        wait_for(lambda: checkpoints(tmp_path), process, 600)
        (rank_1,) = children(process.pid)
        os.kill(rank_1, signal.SIGKILL)
        assert process.wait(60) not in (0, STOPPED)
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log and len([line for line in log.splitlines() if "syncbn: error" in line]) <= 1
