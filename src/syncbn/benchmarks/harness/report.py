"""Results as a table, a CSV file and a picture."""

import csv
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from syncbn.benchmarks.harness.measure import OURS, SMOKE_RUN, Measurement, environment, geometric_means
from syncbn.benchmarks.harness.plot import plot_ratios
from syncbn.progress import progress as progress_of


def write_csv(rows: Sequence[Measurement], path: Path, threads: int) -> None:
    """Write rows to `path`, one line for each, with the environment before it; `threads` of each rank."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*environment(threads), *(field.name for field in fields(Measurement))])
        writer.writeheader()
        for row in rows:
            numbers = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in asdict(row).items()}
            writer.writerow({**environment(threads), **numbers})


def show(rows: Sequence[Measurement], title: str, console: Console) -> None:
    """Print the medians as a table, each with its ratio, and below it the geometric means of the ratios."""
    timed = [row for row in rows if row.unit == "ms"]
    names = list(dict.fromkeys(row.contender for row in timed))
    table = Table(title=title, caption="median in ms (ratio: time of syncbn / time of this contender)")
    for column in ("what", "format", "P", *names):
        table.add_column(column, justify="left" if column in ("what", "format") else "right")
    lines: dict[tuple[str, str, int], dict[str, str]] = {}
    for row in timed:
        ratio = "" if row.contender == OURS else f" ({row.ratio:.2f})"
        lines.setdefault((row.shape, row.memory_format, row.ranks), {})[row.contender] = f"{row.median:.2f}{ratio}"
    means: dict[tuple[str, str, int], dict[str, str]] = {}
    for (_, ranks, memory_format, contender), mean in geometric_means(rows).items():
        means.setdefault(("geometric mean", memory_format, ranks), {})[contender] = f"({mean:.2f})"
    for block in (lines, means):
        for (shape, memory_format, ranks), cells in block.items():
            table.add_row(shape, memory_format, str(ranks), *(cells.get(name, "") for name in names))
        table.add_section()
    console.print(table)


def titled(title: str, quick: bool) -> str:
    """The title of a table or picture; a smoke run says that it is one."""
    return f"{SMOKE_RUN}: {title}" if quick else title


def publish_results(
    rows: Sequence[Measurement], output: Path, name: str, title: str, threads: int, console: Console
) -> None:
    """Print the table; write the CSV and, beside it, the figure, named by date and `name`."""
    path = output / f"{environment(threads)['date']}-{name}.csv"
    show(rows, title, console)
    write_csv(rows, path, threads)
    plot_ratios(rows, path.with_suffix(".png"), f"{title}\n{environment(threads)['cpu']}, torch {torch.__version__}")
    console.print(f"{path} and its .png", soft_wrap=True)


def console() -> Console:
    """Wide enough for the tables where the output is no terminal."""
    found = Console()
    return found if found.is_terminal else Console(width=150)


def progress(console: Console) -> Progress:
    """A progress bar that says what is being timed."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return progress_of(*columns, console=console, transient=True)
