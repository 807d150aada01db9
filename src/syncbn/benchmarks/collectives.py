"""Collectives on the ranks at hand, and from their constants the synchronisation of a training step on up to 1024.

    syncbn benchmark --section collectives                                     # processes on this machine, gloo
    torchrun --nproc_per_node 8 -m syncbn benchmark --section collectives      # NCCL where there are GPUs

Projected is one training step of Inception-BN, forward and backward, in three schemes:
- "all-reduce, grouped": syncbn, 33 messages a direction;
- "all-reduce, per layer": syncbn with a message for each of the 69 layers;
- "all-gather, per layer": as nn.SyncBatchNorm, forward an all-gather of every layer, backward an all-reduce.
Their messages are counted at each number of ranks P in a world of P pretended ranks (torch's fake process group).

The cost model: a message of n bytes takes hops * alpha + bytes on the wire * beta, with alpha the latency of a hop and
beta the time of a byte. Hops and bytes by the algorithm (Thakur, Rabenseifner and Gropp, "Optimization of collective
communication operations in MPICH", 2005, sections 4.1 and 4.5):

| | ring | tree: recursive doubling, halving |
|---|---|---|
| all-reduce, hops | 2 (P - 1) | 2 log2 P |
| all-gather, hops | P - 1 | log2 P |
| all-reduce, bytes | 2 n (P - 1) / P | the same |
| all-gather of n from each rank, bytes | n (P - 1) | the same |

Alpha and beta are fitted to each collective by itself, to the 20th percentiles of its times, since neighbours on the
machine only add to them; the messages of a step are then also sent, and the 20th percentile of their time stands beside
what the model says for the ranks at hand. A projection assumes that hops cost on many ranks what they cost here.
"""

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from syncbn.benchmarks.harness import measure, report
from syncbn.benchmarks.harness.measure import Measurement
from syncbn.benchmarks.harness.messages import ALL_REDUCE, RecordedMessage, recorded
from syncbn.benchmarks.harness.peers import ALL_GATHER
from syncbn.benchmarks.harness.world import run_ranks
from syncbn.benchmarks.step import CONTENDERS, Setting

KEEP_MEMORY = False
SIZES = [4**k for k in range(3, 12)]  # 64 bytes to 4 MiB
PROJECTED = [8, 16, 32, 64, 128, 256, 512, 1024]
GROUPED, PER_LAYER, GATHERED = "all-reduce, grouped", "all-reduce, per layer", "all-gather, per layer"
SCHEMES = {GROUPED: "syncbn", PER_LAYER: "per layer", GATHERED: "all gather, passes"}
"""Who sends each scheme's messages, of `step`'s contenders."""
NAMES = {ALL_REDUCE: "all-reduce", ALL_GATHER: "all-gather"}
COUNTED = Setting(pixels=32, batch=2, width=1.0)  # the messages do not depend on pixels or batch


class Algorithm(NamedTuple):
    """How many hops one message takes on P ranks, by collective."""

    name: str
    hops: dict[str, Callable[[int], int]]


ALGORITHMS = (
    Algorithm("ring", {ALL_REDUCE: lambda P: 2 * (P - 1), ALL_GATHER: lambda P: P - 1}),
    Algorithm(
        "tree", {ALL_REDUCE: lambda P: 2 * math.ceil(math.log2(P)), ALL_GATHER: lambda P: math.ceil(math.log2(P))}
    ),
)


class Constants(NamedTuple):
    """Of one collective: alpha, the latency of a hop in seconds; beta, seconds a byte; the same for each algorithm."""

    alpha: dict[str, float]
    beta: float


def bytes_sent(message: RecordedMessage, P: int) -> float:
    """What each of P ranks sends over the wire for one message."""
    return message.given * (2 * (P - 1) / P if message.collective == ALL_REDUCE else P - 1)


def fit_line(sizes: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Constant and slope, not negative, of the line through the times with the least squares of relative errors."""
    times = torch.tensor(seconds, dtype=torch.float64)
    unknowns = torch.stack([torch.ones_like(times), torch.tensor(sizes, dtype=torch.float64)], 1) / times[:, None]
    constant, slope = torch.linalg.lstsq(unknowns, torch.ones_like(times)[:, None]).solution.flatten().tolist()
    if constant < 0 or slope < 0:  # then the best with one of them 0 is
        single = [float(u.sum() / u.square().sum()) for u in unknowns.T]
        constant, slope = (0.0, single[1]) if constant < 0 else (single[0], 0.0)
    return constant, slope


def constants_of(collective: str, sizes: Sequence[int], seconds: Sequence[float], P: int) -> Constants:
    """Alpha and beta from times of messages that each of P ranks gave so many bytes to."""
    constant, slope = fit_line([bytes_sent(RecordedMessage(collective, n, 0), P) for n in sizes], seconds)
    return Constants({a.name: constant / a.hops[collective](P) for a in ALGORITHMS}, slope)


def time_of(
    messages: Sequence[RecordedMessage], constants: dict[str, Constants], algorithm: Algorithm, P: int
) -> float:
    """Seconds of the messages, one after another, on P ranks."""
    return sum(
        algorithm.hops[m.collective](P) * constants[m.collective].alpha[algorithm.name]
        + bytes_sent(m, P) * constants[m.collective].beta
        for m in messages
    )


def count_messages(rank: int, worlds: Sequence[int]) -> Iterator[tuple[int, dict[str, list[RecordedMessage]]]]:
    """For each number of ranks, the messages of one of them in a step, by scheme. Replaces the process group."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.destroy_process_group()
    network, (images, labels) = COUNTED.network(), COUNTED.whole_batch(1)
    networks = {scheme: CONTENDERS[contender](network) for scheme, contender in SCHEMES.items()}
    for P in worlds:
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=P)
        found = {}
        for scheme, network in networks.items():
            with recorded() as messages:
                F.cross_entropy(network(images), labels).backward()
            found[scheme] = messages
        yield P, found
        dist.destroy_process_group()


def measure_on_rank(
    rank: int, sizes: Sequence[int], steps: dict[str, list[RecordedMessage]], rounds: int, warmup: int
) -> Iterator[list[Measurement]]:
    """Time single collectives of each size, then all messages of a step of each scheme."""
    P, device = dist.get_world_size(), device_of_rank()
    singles = {f"{NAMES[c]} {n}": timed([RecordedMessage(c, n, 0)], P, device) for n in sizes for c in NAMES}
    together = measure.time_in_turns(singles, rounds, warmup, least_ms=1.0)
    for n in sizes:
        times = {name: together[f"{name} {n}"] for name in NAMES.values()}
        yield rows_of("collective", f"{n} bytes", P, times, NAMES[ALL_REDUCE])
    whole = {name: timed(messages, P, device) for name, messages in steps.items()}
    times = measure.time_in_turns(whole, rounds, warmup, least_ms=1.0)
    yield rows_of("messages of a step, sent", "Inception-BN", P, times, GROUPED)


def timed(messages: Sequence[RecordedMessage], P: int, device: torch.device) -> Callable[[], None]:
    """Sends the messages one after another, each waited for."""
    collectives = [message.prepare(P, device) for message in messages]

    def send() -> None:
        for collective in collectives:
            collective()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    return send


def device_of_rank() -> torch.device:
    """Where this rank's messages lie: on its GPU under NCCL, else on the CPU."""
    if not launched() or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def rows_of(section: str, shape: str, P: int, times: dict[str, list[float]], first: str) -> list[Measurement]:
    """One row for each contender; its ratio is of the time of the one named to its own."""
    rows = []
    for name, own in times.items():
        p20, median, p80 = (measure.percentile(own, q) for q in (0.2, 0.5, 0.8))
        ratio = measure.percentile([a / b for a, b in zip(times[first], own, strict=True)], 0.5)
        rows.append(Measurement(section, shape, "", P, name, median, p20, p80, ratio))
    return rows


def fitted(rows: Sequence[Measurement], P: int) -> dict[str, Constants]:
    """The constants of both collectives, from the rows of `measure_on_rank`."""
    found = {}
    for collective, name in NAMES.items():
        own = [row for row in rows if row.section == "collective" and row.contender == name]
        sizes, seconds = [int(row.shape.split()[0]) for row in own], [row.p20 * 1e-3 for row in own]
        found[collective] = constants_of(collective, sizes, seconds, P)
    return found


def project(counts: dict[int, dict[str, list[RecordedMessage]]], constants: dict[str, Constants]) -> list[Measurement]:
    """Time, messages, bytes and receive memory of a step, for each number of ranks and scheme."""
    rows = []
    for P, schemes in counts.items():
        for scheme, messages in schemes.items():
            figures = {f"ms, {a.name}": time_of(messages, constants, a, P) * 1e3 for a in ALGORITHMS}
            figures["messages"] = len(messages)
            figures["bytes sent"] = sum(bytes_sent(m, P) for m in messages)
            figures["receive memory, bytes"] = sum(m.received for m in messages)
            figures["largest receive buffer, bytes"] = max(m.received for m in messages)
            rows += [
                Measurement("projected", "Inception-BN", "", P, scheme, v, v, v, 1.0, unit)
                for unit, v in figures.items()
            ]
    grouped = {(row.ranks, row.unit): row.median for row in rows if row.contender == GROUPED}
    return [replace(row, ratio=grouped[row.ranks, row.unit] / row.median) for row in rows]


def show(rows: Sequence[Measurement], constants: dict[str, Constants], P: int, console: Console, quick: bool) -> None:
    """Print the constants, what they say of the messages that were sent, and the projection."""
    for collective, name in NAMES.items():
        alpha, beta = constants[collective].alpha["ring"], constants[collective].beta
        rate = f"{1e-9 / beta:.2f} GB/s" if beta else "too fast to tell"
        console.print(f"{name} on {P} ranks: {alpha * 1e6:.0f} us a hop (ring), {rate}")
    sent = {row.contender: row.p20 for row in rows if row.section.startswith("messages of a step")}
    for row in rows:
        if row.section == "projected" and row.ranks == P and row.unit == "ms, ring":
            console.print(f"{row.contender} on {P} ranks: model {row.median:.1f} ms, sent {sent[row.contender]:.1f} ms")
    projected = [row for row in rows if row.section == "projected"]
    units = list(dict.fromkeys(row.unit for row in projected))
    title = report.titled("One training step's synchronisation of Inception-BN, each rank", quick)
    table = Table("P", "scheme", title=title)
    for unit in units:
        table.add_column(unit, justify="right")
    cells = {(row.ranks, row.contender, row.unit): row.median for row in projected}
    for ranks, scheme in dict.fromkeys((row.ranks, row.contender) for row in projected):
        values = (cells[ranks, scheme, unit] for unit in units)
        table.add_row(str(ranks), scheme, *(f"{v:,.1f}" if v < 1e3 else f"{v:,.0f}" for v in values))
    console.print(table)


def launched() -> bool:
    """Whether torchrun started this process as one of several ranks."""
    return dist.is_torchelastic_launched()


def results_of_ranks(P: int, *args: object) -> Iterator[list[Measurement]]:
    """What `measure_on_rank` yields, on the ranks that torchrun started, or else on P processes here."""
    if not launched():
        yield from run_ranks(measure_on_rank, P, *args)
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(device_of_rank())
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield from measure_on_rank(dist.get_rank(), *args)  # type: ignore[arg-type]
    finally:
        dist.destroy_process_group()


def run(
    ranks: int = 2,
    projected: list[int] = PROJECTED,
    rounds: int = 41,
    warmup: int = 2,
    quick: bool = False,
    output: Path = measure.RESULTS,
) -> None:
    """Time collectives; project the synchronisation of a training step on many ranks.

    Args:
        ranks: processes on this machine; under torchrun its own count instead.
        projected: numbers of ranks to project to.
        rounds: timings that count.
        warmup: rounds before these.
        quick: a smoke run of few sizes.
        output: folder for the CSV and the figure.

    Raises:
        ValueError: fewer than two ranks send no messages.
    """
    P = int(os.environ["WORLD_SIZE"]) if launched() else ranks
    if min(P, *projected) < 2:
        raise ValueError(f"a message needs two ranks: got {P} ranks here, projected to {projected}")
    sizes = SIZES
    if quick:
        sizes, projected, rounds, warmup = SIZES[::3], projected[-1:], 2, 0
    console = report.console()
    with report.progress(console) as bar:
        worlds = [P, *(p for p in projected if p != P)]
        task = bar.add_task("messages counted", total=len(worlds))
        counts = {}
        for p, found in run_ranks(count_messages, 1, worlds):
            counts[p] = found
            bar.update(task, advance=1)
        task = bar.add_task("collectives", total=len(sizes) + 1)
        rows: list[Measurement] = []
        for more in results_of_ranks(P, sizes, counts[P], rounds, warmup):
            rows += more
            bar.update(task, advance=1)
    if launched() and os.environ["RANK"] != "0":
        return
    constants = fitted(rows, P)
    rows += project(dict(sorted(counts.items())), constants)
    show(rows, constants, P, console, quick)
    publish_projection(rows, output, P, console, quick)


def publish_projection(rows: Sequence[Measurement], output: Path, P: int, console: Console, quick: bool) -> None:
    """Write the CSV and the figure."""
    from syncbn.benchmarks.harness.plot import plot_projection

    threads = torch.get_num_threads() if launched() else 1
    path = output / f"{measure.environment(threads)['date']}-collectives.csv"
    report.write_csv(rows, path, threads)
    backend = "NCCL" if launched() and torch.cuda.is_available() else "gloo"
    title = f"A step's synchronisation of Inception-BN, from constants of {backend} on {P} ranks"
    plot_projection(rows, path.with_suffix(".png"), report.titled(title, quick))
    console.print(f"{path} and its .png", soft_wrap=True)
