"""Going on with a run: which folder, from which checkpoint, and what of its logs stays.

A process learns that it is a restart from the launcher. Rank 0 alone looks into the folders and decides; the others are
told, before any of them loads a checkpoint.
"""

import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from lightning.pytorch import Trainer

from syncbn.data.datasets.formats import EMBEDDED
from syncbn.run_folders import CHECKPOINTS, CONFIG, LAST
from syncbn.training.checkpoints.earlier_data import options_of_run
from syncbn.training.checkpoints.files import fault_of, newest_whole, step_of
from syncbn.training.launch.launchers import ATTEMPT

STARTS = "starts.jsonl"
"""In a run folder: a line for every start of the run, and one for its end."""

DECISION = "SYNCBN_GO_ON_FROM"
"""How a process tells those that it starts from which checkpoint to go on: its path, or nothing."""

CLOCKS_DIFFER = timedelta(minutes=1)
"""Between nodes, at most."""

MATTERS = ("seed_everything", "global_batch_size", "model", "data", "trainer")
INDIFFERENT = {
    "model": {"weights"},
    "data": {"root", "num_workers", "on_read_error", "classes_by_name", "checkpoint_classes"},
}
TRAINER_MATTERS = {"precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"}
"""What of a config a run cannot change on its way: all of model and data but these, of the trainer only these."""


class RestartedJob(NamedTuple):
    """What tells the job that a process belongs to from others, in this start and in its restarts.

    Attributes:
        agent: The torchrun that started the process; "" for none. The same in all restarts by that torchrun.
        run_id: torchrun's ``--rdzv-id``; "" for none.
        slurm_job: SLURM's; "" for none. The same after a requeue.
        words: The command line.
    """

    agent: str
    run_id: str
    slurm_job: str
    words: tuple[str, ...]

    @classmethod
    def from_environment(cls, environment: Mapping[str, str], words: Sequence[str]) -> "RestartedJob":
        """Of this process."""
        # .../RUN-ID_RANDOM/attempt_N/LOCAL-RANK/error.json: a folder that each torchrun makes for itself.
        error_file = environment.get("TORCHELASTIC_ERROR_FILE", "")
        agent = f"{socket.gethostname()}:{Path(error_file).parents[2]}" if error_file else ""
        run_id = environment.get("TORCHELASTIC_RUN_ID", "none")
        job = environment.get("SLURM_JOB_ID", "")
        return cls(agent, "" if run_id == "none" else run_id, job, tuple(words))

    def find_folder(self, parent: Path, environment: Mapping[str, str]) -> Path | None:
        """The newest run folder in which a start of this same job is recorded, if this is a restart."""
        restarted = [count_of(environment, name) for name in ("SLURM_RESTART_COUNT", ATTEMPT)]
        known = {"agent": self.agent}
        if any(restarted):
            known |= {"run_id": self.run_id, "slurm_job": self.slurm_job}
        folders = sorted(parent.glob("version_*"), key=version_of, reverse=True)
        began = torchrun_began(environment)
        for name, value in known.items():
            for folder in folders if value else ():
                starts = read_starts(folder)
                if name == "run_id":  # which may be the same on another day
                    starts = starts_since(starts, began)
                if any(start.get(name) == value and start.get("words") == list(self.words) for start in starts):
                    return folder
        return None


class ResumePoint(NamedTuple):
    """Where a run goes on.

    Attributes:
        folder: Of the run.
        checkpoint: None where there is none yet, and it begins anew.
        step: Optimiser steps done by then.
    """

    folder: Path
    checkpoint: Path | None
    step: int


def count_of(environment: Mapping[str, str], name: str) -> int:
    """A launcher's count of restarts; 0 where it has none."""
    return int(environment.get(name) or 0)


def version_of(folder: Path) -> int:
    """N of version_N; -1 of other names."""
    number = folder.name.partition("_")[2]
    return int(number) if number.isdigit() else -1


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """The lines of `STARTS`; one that a kill has cut off is left out."""
    starts = []
    file = folder / STARTS
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            starts.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return starts


def torchrun_began(environment: Mapping[str, str]) -> datetime:
    """When the torchrun that started this process did so first; now, where its folder is not to be seen."""
    try:
        agent = Path(environment["TORCHELASTIC_ERROR_FILE"]).parents[2]
        # The folder itself changes with every attempt. All of these came after the start, the earliest right after it.
        began = min(path.stat().st_mtime for path in (agent.parent, *agent.iterdir()))
    except (KeyError, OSError):
        return datetime.now(timezone.utc)
    return datetime.fromtimestamp(began, timezone.utc)


def starts_since(starts: list[dict[str, Any]], when: datetime) -> list[dict[str, Any]]:
    """The starts recorded after a moment, give or take a minute between clocks; none of a run that is finished."""
    if "finished" in (starts or [{}])[-1]:
        return []
    return [start for start in starts if datetime.fromisoformat(start["time"]) >= when - CLOCKS_DIFFER]


def record_start(folder: Path, job: RestartedJob, point: ResumePoint | None) -> None:
    """Add a line to `STARTS`."""
    went_on = point.checkpoint.name if point and point.checkpoint else None
    _add_line(folder, {**job._asdict(), "from": went_on})


def record_end(folder: Path, step: int) -> None:
    """Note that the training is over: what then goes on does so from its very last state."""
    _add_line(folder, {"finished": step})


def _add_line(folder: Path, what: dict[str, Any]) -> None:
    when = datetime.now(timezone.utc).isoformat(timespec="seconds")
    with (folder / STARTS).open("a") as lines:
        lines.write(json.dumps({"time": when, **what}) + "\n")


def find_resume_point(folder: Path) -> ResumePoint:
    """The newest whole checkpoint of a run; that of the end where the training is over and it is whole."""

    def say(message: str) -> None:
        print(f"syncbn: {message}", file=sys.stderr, flush=True)

    ended = [start["finished"] for start in read_starts(folder)[-1:] if "finished" in start]
    last = folder / CHECKPOINTS / LAST
    if ended and last.is_file():
        fault = fault_of(last, ended[0])
        if not fault:
            return ResumePoint(folder, last, ended[0])
        say(f"{last} is left out ({fault})")
    found = newest_whole(folder / CHECKPOINTS, say)
    return ResumePoint(folder, found, step_of(found) if found else 0)


def point_by_hand(folder: str) -> ResumePoint:
    """Where ``--resume FOLDER`` goes on.

    Raises:
        ValueError: It is no run folder, or there is no whole checkpoint in it.
    """
    path = Path(folder).resolve()
    if not (path / CHECKPOINTS).is_dir():
        raise ValueError(f"--resume {folder} is no run folder: there is no {path / 'checkpoints'}")
    point = find_resume_point(path)
    if point.checkpoint is None:
        raise ValueError(f"--resume {folder}: there is no whole checkpoint step=N.ckpt in {path / 'checkpoints'}")
    return point


def point_of_restart(parent: Path, job: RestartedJob) -> ResumePoint | None:
    """Where this process goes on by itself: in the folder of the run that its job has begun; None of a new run.

    Args:
        parent: Folder of the run folders.
        job: That this process belongs to.
    """
    folder = job.find_folder(parent, os.environ)
    return find_resume_point(folder) if folder else None


def check_config(folder: Path, config: dict[str, Any]) -> None:
    """Refuse to go on with another config than the run began with, in what its numbers depend on.

    Args:
        folder: Of the run, which has a ``config.yaml``.
        config: Of this start, as the same file would hold it.

    Raises:
        ValueError: A setting differs; the message names it and both values.
    """
    try:
        begun = yaml.safe_load((folder / CONFIG).read_text())
    except OSError:
        return  # killed before it was written
    if "data" in begun and "data" in config:
        begun["data"] |= options_of_run(begun["data"], config["data"].get("root", EMBEDDED))
    before, now = (dict(flatten(one, ())) for one in (begun, config))
    for name in sorted({*before, *now}):
        if matters(name) and before.get(name) != now.get(name):
            raise ValueError(
                f"{'.'.join(name)}={now.get(name)}, but the run {folder} began with {before.get(name)}: go on with that"
                f" value (--config {folder / 'config.yaml'}), or start a run of its own"
            )


def flatten(config: Any, path: tuple[str, ...]) -> Any:
    """The values of a nested dictionary, each with the path to it."""
    if not isinstance(config, dict) or not config:
        yield path, config
        return
    for key, value in config.items():
        yield from flatten(value, (*path, str(key)))


def matters(name: tuple[str, ...]) -> bool:
    """Whether a run may not change this setting on its way."""
    first, second = (*name, "", "")[:2]
    if first == "trainer":
        return second in TRAINER_MATTERS
    return first in MATTERS and second not in INDIFFERENT.get(first, set())


def tell_ranks(trainer: Trainer, point: ResumePoint | None) -> str | None:
    """The checkpoint that rank 0 decided on, on every rank. A collective of processes that a launcher started.

    Args:
        trainer: Not yet fitting.
        point: Where to go on; of rank 0, the others' is not looked at.
    """
    decided = str(point.checkpoint) if point and point.checkpoint else ""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if DECISION in os.environ:  # this process was started by rank 0
        decided = os.environ[DECISION]
    elif environment is not None and trainer.world_size > 1:
        if environment.creates_processes_externally:
            trainer.strategy.setup_environment()
            decided = trainer.strategy.broadcast(decided)
        else:
            os.environ[DECISION] = decided
    return decided or None
