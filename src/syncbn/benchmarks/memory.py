"""Memory of a training step of Inception-BN: the bytes of all tensors alive, from operator to operator.

    syncbn benchmark --section memory

The step is that of section "gpu" (bfloat16 autocast, channels-last; forward, loss, backward, update), run on a CPU.
Counted is what torch's operators return, for as long as it lives: parameters, optimiser, activations, gradients; not
what a kernel takes for itself. So it is also what a step needs on a GPU, but for the libraries' workspaces.

Contenders: syncbn; syncbn with the activations kept; stock layers, nn.BatchNorm2d and a ReLU in place, branch by branch
(by its source nn.SyncBatchNorm keeps the same tensors). Their time is measured, too: what is not kept is computed
again.
"""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from rich.table import Table

from syncbn.benchmarks.gpu.layer import CUDNN
from syncbn.benchmarks.gpu.step import KEPT, StepSetting, build, verify
from syncbn.benchmarks.harness import measure, report
from syncbn.benchmarks.harness.live_tensors import MEBIBYTE, live_bytes
from syncbn.benchmarks.harness.measure import OURS, Measurement

KEEP_MEMORY = True
CONTENDERS = (OURS, KEPT, CUDNN)


def measure_courses(setting: StepSetting) -> dict[str, list[int]]:
    """The course of each contender's memory over a step."""
    return {name: live_bytes(partial(build, name, setting)) for name in CONTENDERS}


def rows_of(setting: StepSetting, courses: Mapping[str, list[int]]) -> list[Measurement]:
    """Each contender's peak; the ratio is syncbn's to it."""
    peaks = {name: max(course) / MEBIBYTE for name, course in courses.items()}
    return [
        Measurement("memory", str(setting), "channels_last", 1, name, v, v, v, peaks[OURS] / v, "MiB at most")
        for name, v in peaks.items()
    ]


def run(
    batch: int = 256,
    timed_batch: int = 16,
    pixels: int = 224,
    width: float = 1.0,
    rounds: int = 7,
    quick: bool = False,
    output: Path = measure.RESULTS,
) -> None:
    """Count the memory of a training step, and time it.

    Args:
        batch: images of the step whose memory is counted.
        timed_batch: images of the step that is timed.
        pixels: their side.
        width: factor on the channels.
        rounds: timings of each contender that count.
        quick: a smoke run, tiny.
        output: folder for the CSV and the figure.
    """
    torch.set_num_threads(1)
    if quick:
        batch, timed_batch, pixels, width, rounds = 8, 2, 64, 0.25, 2
    counted, timed = (StepSetting(n, pixels, width, "cpu") for n in (batch, timed_batch))
    console = report.console()
    verify(timed)
    courses = measure_courses(counted)
    rows = rows_of(counted, courses)
    steps = {name: build(name, timed) for name in CONTENDERS}
    rows += measure.rows_of("step", str(timed), "channels_last", 1, measure.time_in_turns(steps, rounds, 1))
    table = Table("contender", "MiB at most", "syncbn / this", title=report.titled(f"Memory of a {counted}", quick))
    for row in rows[: len(courses)]:
        table.add_row(row.contender, f"{row.median:,.0f}", f"{row.ratio:.3f}")
    console.print(table)
    report.show(rows, report.titled("A training step's time, activations kept or not", quick), console)
    path = output / f"{measure.environment(1)['date']}-memory.csv"
    report.write_csv(rows, path, 1)
    title = report.titled(f"Inception-BN, {counted}, bfloat16 autocast", quick)
    plot_courses(courses, path.with_suffix(".png"), title)
    console.print(f"{path} and its .png", soft_wrap=True)


def plot_courses(courses: Mapping[str, list[int]], path: Path, title: str) -> None:
    """Draw the memory over the step, from its first operator to its last."""
    figure, axis = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for name, course in courses.items():
        share = [i / (len(course) - 1) for i in range(len(course))]
        axis.plot(share, [n / MEBIBYTE for n in course], label=f"{name}: {max(course) / MEBIBYTE:,.0f} MiB at most")
    axis.set(xlabel="operators of the step, first to last", ylabel="MiB of all tensors alive", title=title)
    axis.set_ylim(bottom=0)
    axis.grid(color="0.92")
    axis.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)
