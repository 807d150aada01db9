"""What the README, and the page of docs on training, tell a user to type, typed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from torch import nn

import syncbn
from test_cli import QUICK

REPOSITORY = Path(__file__).parents[1]
README, TRAINING = (REPOSITORY / "README.md").read_text(), (REPOSITORY / "docs" / "training.md").read_text()
BIN = Path(sys.executable).parent


def code_blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """The words of all commands in a page's shell blocks, without comments."""
    lines = [line for block in code_blocks("bash", page) for line in block.strip().splitlines()]
    return [shlex.split(line, comments=True) for line in lines]


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder, with the programs of this environment."""
    program, *rest = words
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    finished = subprocess.run(
        [sys.executable, str(BIN / program), *rest],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    return finished


def write_digits(folder: Path) -> None:
    """A small data set in MNIST's files."""
    folder.mkdir()
    for split, count in (("train", 128), ("t10k", 64)):
        images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), dtype=np.uint8)
        for name, magic, values in (("images-idx3", 2051, images), ("labels-idx1", 2049, np.arange(count) % 10)):
            header = np.array([magic, *values.shape], dtype=">u4").tobytes()
            (folder / f"{split}-{name}-ubyte").write_bytes(header + values.astype(np.uint8).tobytes())


def test_the_loop_runs_on_two_processes(tmp_path):
    loop = code_blocks("python")[0]
    assert len(loop.strip().splitlines()) <= 16
    (tmp_path / "loop.py").write_text(loop)
    [start] = re.findall(r"start with: (.*)", loop)
    finished = run(shlex.split(start), tmp_path)
    assert "Warning" not in finished.stderr
    printed = re.findall(r"rank \d: running mean (\[.*?\])", finished.stdout)  # the lines of two ranks may be joined
    assert len(printed) == 2 and len(set(printed)) == 1, "the same on both ranks"


def test_one_line_converts_and_one_line_is_for_lightning():
    _, convert, plugin = code_blocks("python")
    lightning = pytest.importorskip("lightning")
    names = {"syncbn": syncbn, "lightning": lightning, "net": nn.Sequential(nn.BatchNorm2d(3))}
    for line in (convert, plugin):
        assert len(line.strip().splitlines()) == 1
        exec(line, names)
    assert isinstance(names["net"][0], syncbn.SyncBatchNorm)
    assert isinstance(names["trainer"], lightning.Trainer)


def test_the_commands_run(tmp_path):
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    write_digits(tmp_path / "PATH")
    assert len(commands(TRAINING)) == 4
    for words in commands(TRAINING):
        quick = QUICK if "fit" in words else ["--trainer.accelerator=cpu"]
        if "PATH" in words:
            quick = [*quick, "--data.validation_images=32"]
        run([*words, *quick], tmp_path)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"fashion_mnist", "mine"}


def test_the_readme_tells_the_commands_that_are_run():
    """Continuous integration calls the second one."""
    first, second, *others = commands(README)
    assert (first, second) == (["make", "train"], ["make", "test"])
    assert {words[0] for words in others} == {"syncbn", "torchrun", "sbatch"}
    for words in others:
        if words[0] == "sbatch":
            assert (REPOSITORY / words[1]).is_file() and (REPOSITORY / words[-1]).is_file()
        else:
            assert words in commands(TRAINING)


def test_the_readme_is_read_in_two_minutes():
    assert len(README.split()) <= 950


@pytest.mark.parametrize("target", ["train", "test", "test-slow", "benchmark"])
def test_make_knows_its_targets(target):
    subprocess.run(["make", "--dry-run", target], cwd=REPOSITORY, check=True, capture_output=True, timeout=60)


@pytest.mark.parametrize(
    ("gpus", "options"), [(0, ["--trainer.accelerator", "cpu"]), (1, ["--trainer.devices", "1"]), (2, []), (8, [])]
)
def test_make_train_asks_for_the_devices_that_there_are(gpus, options, tmp_path):
    """Lightning's accelerator=auto alone takes a Mac's GPU, and refuses two processes there."""
    (tmp_path / "torch.py").write_text(f"from types import SimpleNamespace as S\ncuda = S(device_count=lambda: {gpus})")
    for name, does in {
        "syncbn": 'echo "$@"',
        "python": f"PYTHONPATH={tmp_path} exec {sys.executable} " + '"$@"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)
    (tmp_path / "package").touch()  # newer than what it is made of
    words = ["make", "--silent", f"BIN={tmp_path}", f"PACKAGE={tmp_path / 'package'}", "train"]
    done = subprocess.run(words, cwd=REPOSITORY, check=True, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["fit", "--config", "configs/fashion_mnist.yaml", *options]
