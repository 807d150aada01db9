"""The verb ``syncbn prepare``: archives or folders of images in, shards out."""

import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from syncbn.data.datasets.base import is_imagenet
from syncbn.data.datasets.image_folder import class_names
from syncbn.data.datasets.shard_files import read_index
from syncbn.data.datasets.splits import find_splits
from syncbn.data.preparation.checking import check_shards
from syncbn.data.preparation.folder import plan_folder
from syncbn.data.preparation.imagenet import plan_imagenet
from syncbn.data.preparation.job import (
    JOB_NAME,
    REPORT_NAME,
    carry_out,
    check_finished,
    clean_up,
    finish,
    is_finished,
    make_report,
    noted_options,
    opened_destination,
    require_agreement,
)
from syncbn.data.preparation.plan import PreparationPlan
from syncbn.data.preparation.summary import print_findings, print_summary
from syncbn.data.preparation.tasks import ShardOptions, write_json
from syncbn.data.preparation.workers import worker_pool


def imagenet(
    source: Path,
    destination: Path,
    shorter_side: int | None = None,
    quality: int = 95,
    shard_megabytes: float = 100,
    workers: int | None = None,
    max_dropped: float = 0.01,
    exif_orientation: bool = False,
) -> None:
    """Make shards of ImageNet's archives as they are downloaded, without unpacking them.

    May be interrupted at any moment: the same command again goes on where it was. Labels are the sorted wnids,
    counted from 0. Images smaller than ``shorter_side`` keep their size.

    Args:
        source: Folder with ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and ILSVRC2012_devkit_t12.tar.gz.
        destination: Folder for the shards.
        shorter_side: Make images smaller, to so many pixels. Without it, healthy files are copied byte by byte.
        quality: Of JPEG, 1 to 100, where images are encoded again.
        shard_megabytes: About how large a shard gets.
        workers: Processes; all cores without it.
        max_dropped: Fraction of the images that may be lost to damage before it is an error.
        exif_orientation: Whether images are turned as their EXIF says. ImageNet's labels and accuracies are about the
            pixels as stored.

    Raises:
        ValueError: An archive is missing, more was dropped than ``max_dropped``, or the destination holds
            something else.
        OSError: A file cannot be read or written.
    """
    options = ShardOptions(shorter_side, quality, shard_megabytes, exif_orientation)
    description = {"source": "imagenet", **asdict(options)}
    _prepare(lambda pool: plan_imagenet(source, pool), source, destination, options, description, workers, max_dropped)


def folder(
    source: Path,
    destination: Path,
    shorter_side: int | None = None,
    quality: int = 95,
    shard_megabytes: float = 100,
    validation_fraction: float | None = None,
    workers: int | None = None,
    max_dropped: float = 0.01,
    exif_orientation: bool | None = None,
) -> None:
    """Make shards of images in one folder a class: SRC/train/, SRC/val/ and SRC/test/<class>/, or SRC/<class>/.

    May be interrupted at any moment: the same command again goes on where it was. Labels are the sorted names of
    the training folders, counted from 0. Images in folders within a class folder belong to that class. Splits may have
    their other usual names ("valid", "Train", "training_set").

    Args:
        source: Folder with the images.
        destination: Folder for the shards.
        shorter_side: Make images smaller, to so many pixels. Without it, healthy files are copied byte by byte.
        quality: Of JPEG, 1 to 100, where images are encoded again.
        shard_megabytes: About how large a shard gets.
        validation_fraction: How much of each class becomes validation images where there is no SRC/val; a tenth
            without it.
        workers: Processes; all cores without it.
        max_dropped: Fraction of the images that may be lost to damage before it is an error.
        exif_orientation: Whether images are turned as their EXIF says, and encoded again. Without it, as before where
            the destination was begun; else they are, but not ImageNet's, known by its classes' names (n01440764 ...).

    Raises:
        ValueError: There are no images, more was dropped than ``max_dropped``, or the destination holds
            something else.
        OSError: A file cannot be read or written.
    """
    if destination.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{destination} lies in {source}, where it would pass for a class: name another folder")
    if validation_fraction is not None and not 0 < validation_fraction < 1:
        raise ValueError(f"validation_fraction={validation_fraction} must be between 0 and 1")
    options = ShardOptions(shorter_side, quality, shard_megabytes, _turns(exif_orientation, source, destination))
    description = {"source": "folder", **asdict(options), "validation_fraction": validation_fraction}

    def make_plan(_: ProcessPoolExecutor) -> PreparationPlan:
        return plan_folder(source, validation_fraction)

    _prepare(make_plan, source, destination, options, description, workers, max_dropped)


def _turns(asked: bool | None, source: Path, destination: Path) -> bool:
    """Whether images are turned as their EXIF says."""
    noted = noted_options(destination / JOB_NAME).get("exif_orientation")
    if asked is not None or noted is not None or not source.is_dir():
        return bool(noted if asked is None else asked)
    return not is_imagenet(class_names(find_splits(source).of["train"]))


def check(destination: Path, workers: int | None = None) -> None:
    """Verify the size, the SHA-256 and the members of every shard.

    Args:
        destination: What ``syncbn prepare`` wrote.
        workers: Processes; all cores without it.

    Raises:
        ValueError: The index is missing or broken, or shards are bad; each is named.
    """
    index = read_index(destination)
    with worker_pool(workers) as pool:
        bad = check_shards(index, pool)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for line in bad:
        console.print(line)
    shards = sum(len(split.shards) for split in index.splits.values())
    if bad:
        raise ValueError(f"{len(bad)} of {shards} shards are bad: delete {destination} and prepare the data again")
    console.print(f"{shards} shards of {destination} are as they were written")


def _prepare(
    make_plan: Callable[[ProcessPoolExecutor], PreparationPlan],
    source: Path,
    destination: Path,
    options: ShardOptions,
    description: dict[str, Any],
    workers: int | None,
    max_dropped: float,
) -> None:
    """What every source has in common; ``description`` is what another run must agree with."""
    started = time.monotonic()
    if not 0 <= max_dropped <= 1:
        raise ValueError(f"max_dropped={max_dropped} must be in 0..1")
    if is_finished(destination):
        require_agreement(destination / JOB_NAME, description)
        check_finished(destination, source)
        clean_up(destination)
        print(f"{destination} is finished already; `syncbn prepare check {destination}` verifies it")
        return
    with opened_destination(destination, description), worker_pool(workers) as pool:
        plan = make_plan(pool)
        outcomes = carry_out(plan, destination, options, description, pool)
        report = make_report(plan, outcomes)
        write_json(destination / REPORT_NAME, report.content())
        print_findings(report)
        if report.dropped_fraction > max_dropped:
            raise ValueError(
                f"{report.dropped_fraction:.2%} of the images were dropped, more than --max_dropped {max_dropped}:"
                f" see {destination / REPORT_NAME}; with a greater --max_dropped the same command finishes at once"
            )
        index = finish(plan, source, destination, outcomes)
    print_summary(index, report, started)


COMMANDS = {"imagenet": imagenet, "folder": folder, "check": check}
