"""Carries out a plan: shards on all cores, each whole or not there, and at the end the index.

The destination's ``job.json`` says how it is made, so that a later run goes on only as the first began. Until the
job is finished a folder ``.prepare`` holds the outcome of each finished shard. ``index.json`` is written last.
"""

import fcntl
import json
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from syncbn.data.datasets.base import IMAGENET_MEAN, IMAGENET_STD
from syncbn.data.datasets.shard_files import (
    INDEX_NAME,
    SAMPLE_DTYPE,
    Shard,
    ShardIndex,
    damaged_shards,
    make_split,
    read_index,
    write_index,
)
from syncbn.data.preparation.plan import PreparationPlan, SourceFinding
from syncbn.data.preparation.tasks import (
    WORK_FOLDER,
    ShardOptions,
    ShardOutcome,
    cut_into_shards,
    finished_outcome,
    make_shard,
    measure_shrinkage,
    write_json,
)
from syncbn.data.preparation.workers import finished, progress_bar

JOB_NAME = "job.json"
REPORT_NAME = "report.json"
UNFINISHED = ".*.part*"
"""Files that an interrupted job leaves: those of `atomic_file`, here and in earlier versions."""


@dataclass(frozen=True)
class PreparationReport:
    """What a job kept and what it did not.

    Attributes:
        written: Images in the shards, by split.
        planned: Images there should be, by split.
        dropped: Images and archives that were lost, each with the reason.
        repaired: Images that were changed to be kept.
    """

    written: dict[str, int]
    planned: dict[str, int]
    dropped: tuple[SourceFinding, ...]
    repaired: tuple[SourceFinding, ...]

    @property
    def dropped_fraction(self) -> float:
        """Of the images there should be, those that are not in the shards."""
        return sum(finding.lost for finding in self.dropped) / max(sum(self.planned.values()), 1)

    def content(self) -> dict[str, Any]:
        """The report as it is written to a file."""
        return {
            "images": {
                split: {"planned": self.planned[split], "written": self.written[split]} for split in self.planned
            },
            "dropped": [finding._asdict() for finding in self.dropped],
            "repaired": [finding._asdict() for finding in self.repaired],
        }


@contextmanager
def opened_destination(destination: Path, description: dict[str, Any]) -> Iterator[None]:
    """A destination to this process alone, with the leavings of an interrupted run removed.

    Args:
        destination: The folder of the shards; made where there is none.
        description: How they are made, the same in every run.

    Raises:
        ValueError: Another process is writing there, the shards there are made in another way, or there are
            other files.
    """
    entries = {path.name for path in destination.glob("*") if not path.match(UNFINISHED)} - {WORK_FOLDER}
    if entries and JOB_NAME not in entries:
        raise ValueError(f"{destination} holds other files ({min(entries)}): name a new folder")
    (destination / WORK_FOLDER).mkdir(parents=True, exist_ok=True)
    with (destination / WORK_FOLDER / "lock").open("w") as lock:  # the lock ends with this process, however it ends
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another `syncbn prepare` is writing to {destination}") from error
        require_agreement(destination / JOB_NAME, description)
        for leaving in destination.rglob(UNFINISHED):
            leaving.unlink()
        yield


NOTED_BEFORE = {"exif_orientation": False}
"""What a job means that was begun when the option did not exist."""


def require_agreement(path: Path, wanted: dict[str, Any]) -> None:
    """Make sure that the shards are made as was noted before, if anything was.

    Raises:
        ValueError: They are not; the message names what differs.
    """
    noted = noted_options(path)
    differing = [key for key in wanted if key in noted and wanted[key] != noted[key]]
    if differing:
        was, given = (", ".join(f"{key}={values[key]}" for key in differing) for values in (noted, wanted))
        raise ValueError(
            f"{path.parent} was begun with {was}, and this is {given}: go on as it was begun, name another folder,"
            " or delete this one"
        )


def noted_options(path: Path) -> dict[str, Any]:
    """How a job was begun; nothing where it was not."""
    return NOTED_BEFORE | json.loads(path.read_text()) if path.exists() else {}


def carry_out(
    plan: PreparationPlan,
    destination: Path,
    options: ShardOptions,
    description: dict[str, Any],
    pool: ProcessPoolExecutor,
) -> dict[str, list[ShardOutcome]]:
    """Write all shards of a plan that are not there yet.

    Args:
        plan: What to write.
        destination: Where, opened by `opened_destination`.
        options: How.
        description: What another run must agree with.
        pool: Does it.

    Returns:
        What became of each shard, by split, in order.

    Raises:
        ValueError: The source is not what it was when the job began.
        OSError: An image cannot be read, or a shard not be written; what is finished is kept.
    """
    description = description | {"images": plan.fingerprint()}
    require_agreement(destination / JOB_NAME, description)
    write_json(destination / JOB_NAME, noted_options(destination / JOB_NAME) | description)
    shrinkage = measure_shrinkage(plan.splits["train"], options, pool)
    tasks = [
        task
        for split, images in plan.splits.items()
        for task in cut_into_shards(split, images, shrinkage, options.shard_megabytes)
    ]
    outcomes = {task.name: outcome for task in tasks if (outcome := finished_outcome(task, destination))}
    if outcomes:
        print(f"{len(outcomes)} of {len(tasks)} shards are there already")
    todo = [task for task in tasks if task.name not in outcomes]
    with progress_bar() as progress:
        bar = progress.add_task("writing images", total=sum(len(task.images) for task in todo))
        for task, outcome in finished(pool, make_shard, todo, destination, options):
            outcomes[task.name] = outcome
            progress.advance(bar, len(task.images))
    return {split: [outcomes[task.name] for task in tasks if task.split == split] for split in plan.splits}


def make_report(plan: PreparationPlan, outcomes: dict[str, list[ShardOutcome]]) -> PreparationReport:
    """What was kept and what was not."""
    flat = [outcome for split in outcomes.values() for outcome in split]
    planned = {
        split: len(images) + sum(finding.lost for finding in plan.findings if finding.split == split)
        for split, images in plan.splits.items()
    }
    return PreparationReport(
        written={split: sum(outcome.shard.samples for outcome in outcomes[split]) for split in outcomes},
        planned=planned,
        dropped=(*plan.findings, *sorted(finding for outcome in flat for finding in outcome.dropped)),
        repaired=tuple(sorted(finding for outcome in flat for finding in outcome.repaired)),
    )


def finish(
    plan: PreparationPlan, source: Path, destination: Path, outcomes: dict[str, list[ShardOutcome]]
) -> ShardIndex:
    """Write the index; the destination is then whole."""
    splits = {}
    for split, of_split in outcomes.items():
        records: list[tuple[int, int, int, int]] = []
        shards: list[Shard] = []
        for outcome in of_split:
            if outcome.places:
                records += [(len(shards), *place) for place in outcome.places]
                shards.append(outcome.shard)
            else:  # every image was dropped: readers need not know of an empty shard
                (destination / outcome.shard.name).unlink(missing_ok=True)
        splits[split] = make_split(shards, np.array(records, SAMPLE_DTYPE), len(plan.classes))
    noted = noted_options(destination / JOB_NAME)
    turned = noted["exif_orientation"]
    index = ShardIndex(destination, plan.classes, plan.class_names, IMAGENET_MEAN, IMAGENET_STD, splits, turned)
    write_json(destination / JOB_NAME, noted | {"finished_from": str(source.resolve())})
    write_index(index)
    clean_up(destination)
    return index


def is_finished(destination: Path) -> bool:
    """Whether an earlier run came to the end."""
    return (destination / INDEX_NAME).exists()


def check_finished(destination: Path, source: Path) -> None:
    """Make sure that a finished destination was made of this source, and that its shards are still there.

    Raises:
        ValueError: It was made of another one, or a shard is missing or has another size.
    """
    made_of = noted_options(destination / JOB_NAME).get("finished_from", str(source.resolve()))
    if made_of != str(source.resolve()):
        raise ValueError(f"{destination} is finished, made of {made_of} and not of {source}: name another folder")
    damaged = damaged_shards(read_index(destination))
    if damaged:
        raise ValueError(f"{damaged[0]}: delete {destination} and run the command again ({len(damaged)} such shards)")


def clean_up(destination: Path) -> None:
    """Remove what only an unfinished job needs."""
    shutil.rmtree(destination / WORK_FOLDER, ignore_errors=True)
