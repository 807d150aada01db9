"""What the README tells a user to type, typed."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from syncbn.benchmarks.command import SECTIONS, parser
from test_cli import QUICK

REPOSITORY = Path(__file__).parents[1]
README = (REPOSITORY / "README.md").read_text()
BIN = Path(sys.executable).parent


def code_blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


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
    [loop] = code_blocks("python")
    assert len(loop.strip().splitlines()) <= 16
    (tmp_path / "loop.py").write_text(loop)
    [start] = re.findall(r"start with: (.*)", loop)
    finished = run(shlex.split(start), tmp_path)
    assert "Warning" not in finished.stderr
    printed = re.findall(r"rank \d: running mean (\[.*?\])", finished.stdout)  # the lines of two ranks may be joined
    assert len(printed) == 2 and len(set(printed)) == 1, "the same on both ranks"


def test_the_commands_run(tmp_path):
    [block] = [block for block in code_blocks("bash") if "configs/fashion_mnist.yaml" in block]
    (tmp_path / "configs").symlink_to(REPOSITORY / "configs")
    write_digits(tmp_path / "PATH")
    commands = [line.partition("#")[0] for line in block.strip().splitlines()]
    assert len(commands) == 4
    for command in commands:
        words = shlex.split(command)
        quick = QUICK if "fit" in words else ["--trainer.accelerator=cpu"]
        if "PATH" in words:
            quick = [*quick, "--data.validation_images=32"]
        run([*words, *quick], tmp_path)
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"fashion_mnist", "mine"}


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


def test_every_file_that_the_readme_names_is_there():
    for path in re.findall(r"\]\(((?!http)[^)]+)\)", README):
        assert (REPOSITORY / path).exists(), path


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`syncbn benchmark (.*?)`", README))))
def test_the_benchmarks_have_the_options_that_the_readme_names(command):
    assert parser().parse_args(shlex.split(command)).section in SECTIONS
