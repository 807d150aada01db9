"""Trainings by a recipe, one ``syncbn fit`` after another, each kept when it is finished and gone on with if not."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from syncbn.training.checkpoints.resuming import find_resume_point, version_of
from syncbn.training.run.curves import read_series

RUNS = "seed_*/*/version_*"
"""Where the run folders are in the folder of an experiment's runs."""

FINISHED = "finished"
"""The file in a run's folder that says it has ended; in it the error, where the run diverged."""

SECONDS = "seconds"
"""The file in a run's folder with the time of each of its starts, one a line."""

NOT_FINITE = "not finite"
"""What the trainer's error of a loss that is no number says."""


SECONDS_BETWEEN_LINES = 60.0
"""From one line of a training's log that is shown to the next."""


@dataclass(frozen=True)
class ValidationCurve:
    """Validation accuracy over training.

    Attributes:
        steps: Optimiser steps taken, int64, shape (N,), rising.
        top1: Single-crop accuracy after them, in 0..1, float64, shape (N,).
        diverged_after: The first step, from 0, whose training loss or layers are not finite; None if there is none.
    """

    steps: np.ndarray
    top1: np.ndarray
    diverged_after: int | None = None

    @property
    def best(self) -> float | None:
        """The highest accuracy, in 0..1; None without an evaluation."""
        return float(self.top1.max()) if len(self.top1) else None

    def steps_to(self, accuracy: float) -> int | None:
        """The steps after which an evaluation first found an accuracy, in 0..1, or more; None if none did."""
        reached = np.flatnonzero(self.top1 >= accuracy)
        return int(self.steps[reached[0]]) if len(reached) else None


@contextmanager
def claimed_folder(folder: Path, settings: dict[str, Any]) -> Iterator[IO[str]]:
    """A folder of runs to this command alone, all of them with the same settings.

    Args:
        folder: Made where there is none.
        settings: What all runs in it have in common; noted in ``settings.json``.

    Yields:
        The open file whose lock claims the folder; handed down to a training, it holds as long as that one runs.

    Raises:
        ValueError: The folder is in use, its runs have other settings, or a file is in its place.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{folder} cannot be made, since a file is in its place: name another folder") from error
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{folder} is in use: another command, or the training that one started, is still running"
            ) from error
        noted_in = folder / "settings.json"
        noted = json.loads(noted_in.read_text()) if noted_in.is_file() else settings
        differing = sorted(key for key in noted.keys() | settings.keys() if noted.get(key) != settings.get(key))
        if differing:
            name = differing[0]
            raise ValueError(
                f"{folder} holds runs with {name}={noted.get(name)}, and this is {name}={settings.get(name)}:"
                " go on as they were begun, name another folder, or delete this one"
            )
        noted_in.write_text(json.dumps(settings, indent=1) + "\n")
        yield lock


def train(runs_folder: Path, name: str, options: Sequence[str], lock: IO[str]) -> Path:
    """Run ``syncbn fit`` to its end, from its newest checkpoint where there is one; do nothing if it has ended before.

    A training whose loss is not finite any more has ended too.

    Args:
        runs_folder: Where the folder of this run goes.
        name: Of the run.
        options: Of ``syncbn fit``, without these two.
        lock: From `claimed_folder`.

    Returns:
        The folder of the run, with ``version_0``, and more of them where it was interrupted before a checkpoint.

    Raises:
        ValueError: The training stopped with an error; the message is its last line.
    """
    folder = runs_folder / name
    finished = folder / FINISHED
    if finished.is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    words = ["fit", *options, f"--runs_folder={runs_folder}", f"--name={name}", "--test_after_fit=false"]
    begun = resumable_version(folder)
    if begun:
        words.append(f"--resume={begun}")
    log = folder / "fit.log"
    start = time.monotonic()
    try:
        with log.open("a") as output:
            status = _run(words, output, lock)
    finally:
        with (folder / SECONDS).open("a") as seconds:
            seconds.write(f"{time.monotonic() - start:.1f}\n")
    message = ""
    if status:
        lines = log.read_text().strip().splitlines()
        message = lines[-1].removeprefix("syncbn: error: ") if lines else f"exit status {status}"
        if NOT_FINITE not in message:
            raise ValueError(f"the training {name} stopped: {message} (see {log})")
    finished.write_text(message)
    return folder


def resumable_version(folder: Path) -> Path | None:
    """The newest of a run's versions that has a whole checkpoint."""
    return next((version for version in reversed(versions(folder)) if find_resume_point(version).checkpoint), None)


def versions(folder: Path) -> list[Path]:
    """The folders version_0, version_1 and so on of a run, in this order."""
    return sorted(folder.glob("version_*"), key=version_of)


def seconds_trained(folder: Path) -> float | None:
    """The time of a run, all its starts together, evaluations included; None where it was not noted."""
    noted = folder / SECONDS
    return sum(map(float, noted.read_text().split())) if noted.is_file() else None


def _run(words: list[str], output: IO[str], lock: IO[str]) -> int:
    """The exit status of ``syncbn`` with these words; it ends with this process, unless that is killed outright."""
    process = subprocess.Popen(
        [sys.executable, "-m", "syncbn", *words],
        stdout=output,
        stderr=subprocess.STDOUT,
        pass_fds=[lock.fileno()],
        env=os.environ | {"PYTHONUNBUFFERED": "1"},
    )
    with exit_on_sigterm():
        try:
            while True:
                try:
                    return process.wait(SECONDS_BETWEEN_LINES)
                except subprocess.TimeoutExpired:
                    last = Path(output.name).read_text(errors="replace").rstrip().rpartition("\n")[2]
                    print(f"  {last}", flush=True)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Have SIGTERM raise SystemExit meanwhile, so that what was begun is ended in order."""
    handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def validation_curve(folder: Path) -> ValidationCurve:
    """The curve of a run, put together from its versions: where two have a step, the later one counts."""
    accuracies: dict[int, float] = {}
    finished = folder / FINISHED
    for version in versions(folder):
        log = version / "metrics.csv"
        if not log.is_file():
            continue
        accuracies |= dict(zip(*read_series(log, "val_top1"), strict=True))
    # Lightning logs an evaluation with the number of the last step, counted from 0.
    steps = np.array(sorted(accuracies), dtype=np.int64)
    stopped = re.search(r"\bstep (\d+)", finished.read_text()) if finished.is_file() else None
    diverged_after = int(stopped[1]) if stopped else None
    return ValidationCurve(steps + 1, np.array([accuracies[step] for step in steps.tolist()]), diverged_after)
