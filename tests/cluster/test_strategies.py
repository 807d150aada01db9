"""Every config of configs/strategy by the command itself: train, save, test, go on, leave without a crash."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

CONFIGS = Path(__file__).parents[2] / "configs"
STRATEGIES = sorted((CONFIGS / "strategy").glob("*.yaml"))
SHORT = (
    "--global_batch_size=32",
    "--trainer.max_epochs=1",
    "--trainer.accelerator=cpu",
    "--trainer.limit_train_batches=4",
    "--trainer.limit_val_batches=1",
    "--trainer.limit_test_batches=1",
    "--checkpointing.every_n_steps=2",
    "--runs_folder=runs",
)


def syncbn(folder: Path, *words: str) -> str:
    """What the command prints; it must end well, on all ranks."""
    done = subprocess.run(
        [sys.executable, "-m", "syncbn", *words],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for trouble in ("Aborted", "terminate called", "Traceback"):  # of the other rank, too
        assert trouble not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize("config", STRATEGIES, ids=lambda path: path.stem)
def test_a_run_is_saved_and_gone_on_with(config: Path, tmp_path: Path) -> None:
    if "deepspeed" in config.stem:
        pytest.importorskip("deepspeed", reason="needs the extra syncbn[deepspeed]")
    words = ("fit", "--config", str(CONFIGS / "fashion_mnist.yaml"), "--config", str(config), *SHORT)
    printed = syncbn(tmp_path, *words)
    assert "test accuracy" in printed
    run = Path(printed.splitlines()[-1])
    last = tmp_path / run / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(last, weights_only=True)
    assert checkpoint["global_step"] == 4 and checkpoint["optimizer_states"][0]["state"]
    words = ("fit", "--config", str(run / "config.yaml"), "--resume", str(run), "--trainer.max_epochs=2")
    assert (tmp_path / syncbn(tmp_path, *words).splitlines()[-1]).samefile(tmp_path / run)
    assert torch.load(last, weights_only=True)["global_step"] == 8
    evaluation = ("validate", "--config", str(tmp_path / run / "config.yaml"), f"--ckpt_path={last}")
    assert "validation accuracy" in syncbn(tmp_path, *evaluation)
    assert str(tmp_path / "folded.onnx") in syncbn(
        tmp_path, "export", str(last), "--format", "onnx", "--output", str(tmp_path / "folded.onnx")
    )
