"""Figure 1: what BatchNorm does to a small network on MNIST (section 4.1 of Ioffe & Szegedy 2015)."""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn

from syncbn.data.datasets.mnist import default_folder, fetch_mnist
from syncbn.data.loading.samplers import split_global_batch
from syncbn.experiments.figure1_report import write_report
from syncbn.experiments.rank_processes import run_on_ranks
from syncbn.experiments.recipe_runs import claimed_folder
from syncbn.experiments.sigmoid_network import Curves, Digits, Run, Training, load_digits, revision_of
from syncbn.progress import progress as progress_of

SETTINGS = [(0.1, 0.1), (0.01, 0.1), (0.1, 0.01)]
"""Learning rate and standard deviation of the initial weights: the paper states neither, so there are several."""


def figure1(
    output: Path = Path("runs/figure1"),
    data: Path | None = None,
    steps: int = 50_000,
    seeds: int = 3,
    settings: list[tuple[float, float]] = SETTINGS,
    ranks: int = 1,
    batch_size: int = 60,
    evaluate_every: int = 500,
    threshold: int = 127,
    precision: Literal["float32", "float64"] = "float32",
) -> None:
    """Train a small sigmoid network with and without BatchNorm on MNIST, and draw Figure 1 of the paper.

    May be interrupted at any moment: the same command again goes on where it was.

    Args:
        output: Folder for figure1.png, figure1.csv, figure1.md, and the checkpoints of the runs.
        data: Folder with MNIST's four idx files, plain or gzipped; those that it lacks are downloaded into it. Without
            it, a folder in the user's cache.
        steps: Of SGD, in each run (the paper: 50,000).
        seeds: How many: 0, 1 and so on decide the initial weights and the order of the images.
        settings: Pairs of the learning rate and the standard deviation of the initial weights, which the paper does
            not state.
        ranks: With more than 1, the network with BatchNorm is also trained on so many processes, with the first
            setting and seed, and drawn over the curve of one process.
        batch_size: Of a mini-batch, over all processes (the paper: 60).
        evaluate_every: Steps from one evaluation on the test images to the next.
        threshold: Pixels above it become 1, others 0. The paper has binary images, and does not state how.
        precision: Of training: "float32" or "float64".

    Raises:
        ValueError: An argument is out of range, the data are broken or cannot be downloaded, or the output folder is
            in use or holds runs with other settings.
    """
    _check(steps, seeds, settings, ranks, batch_size, evaluate_every)
    torch.set_num_threads(1)  # for so small a network more only wait for each other
    folder = default_folder() if data is None else data.expanduser()
    fetch_mnist(folder)
    train, test = load_digits(folder, threshold)
    if batch_size > len(train.labels):
        raise ValueError(f"batch_size={batch_size} exceeds the {len(train.labels):,} training images")
    runs = [
        Run(batch_norm, rate, std, seed, 1, steps, batch_size, evaluate_every, precision)
        for rate, std in settings
        for seed in range(seeds)
        for batch_norm in (False, True)
    ]
    if ranks > 1:
        runs.append(replace(runs[1], ranks=ranks))
    common = {
        "steps": steps,
        "batch_size": batch_size,
        "evaluate_every": evaluate_every,
        "threshold": threshold,
        "precision": precision,
        "training_images_sha256": hashlib.sha256(train.images.numpy().tobytes()).hexdigest(),
    }
    with claimed_folder(output / "runs", common):
        results = _train_all(runs, train, test, output / "runs")
    revisions = [revision_of(output / "runs" / f"{run.name}.pt") for run in runs]
    write_report(results, output, threshold, revisions)
    print((output / "figure1.md").read_text())


def _check(
    steps: int,
    seeds: int,
    settings: list[tuple[float, float]],
    ranks: int,
    batch_size: int,
    evaluate_every: int,
) -> None:
    at_least_1 = {"steps": steps, "seeds": seeds, "ranks": ranks, "evaluate_every": evaluate_every}
    for name, value in at_least_1.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    split_global_batch(batch_size, ranks)
    if not settings or len(set(settings)) < len(settings):
        raise ValueError(f"settings={settings}: different pairs of learning rate and std are needed, at least one")
    for rate, std in settings:
        if rate <= 0 or std < 0:
            raise ValueError(f"settings={settings}: a learning rate must be positive, and std not negative")


def _train_all(runs: list[Run], train: Digits, test: Digits, folder: Path) -> dict[Run, Curves]:
    """The curves of all runs; what is finished already is read."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    results = {}
    with progress_of(*columns) as bar:
        task = bar.add_task("training", total=sum(run.steps for run in runs))
        for number, run in enumerate(runs):
            before = sum(earlier.steps for earlier in runs[:number])

            def progress(step: int, before: int = before) -> None:
                bar.update(task, completed=before + step)

            bar.update(task, description=f"run {number + 1} of {len(runs)}: {run.name}", completed=before)
            results[run] = _train(run, train, test, folder / f"{run.name}.pt", progress)
        bar.update(task, completed=bar.tasks[task].total)
    return results


def _train(run: Run, train: Digits, test: Digits, checkpoint: Path, progress: Callable[[int], None]) -> Curves:
    training = Training(run, train, test, checkpoint)
    if training.step == run.steps:
        return training.curves
    if run.ranks == 1:
        return training.complete(progress)
    run_on_ranks(_train_on_rank, run.ranks, run, train, test, checkpoint, progress=progress)
    return Training(run, train, test, checkpoint).curves


def _train_on_rank(
    rank: int, progress: Callable[[int], None], run: Run, train: Digits, test: Digits, checkpoint: Path
) -> None:
    Training(run, train, test, checkpoint, rank).complete(progress)
