"""One layer, forward and backward, at every activation shape of Inception-BN at 224 pixels, in float32.

    syncbn benchmark --section layer                 # both parts; minutes on two cores
    syncbn benchmark --section layer --layer.part alone --layer.batch 32 --layer.rounds 15

Part "alone": SyncBatchNorm in a world of one against nn.BatchNorm2d. Part "ranks": SyncBatchNorm on P processes
against the algorithms of peers.py. Letters: N batch, C channels, H W space, M elements per channel, P ranks.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.benchmarks.harness import measure, report
from syncbn.benchmarks.harness.measure import FORMATS, OURS, Measurement
from syncbn.benchmarks.harness.peers import ARITHMETIC, EXCHANGE, PeerBatchNorm
from syncbn.benchmarks.harness.world import run_ranks
from syncbn.models.table import STEM_CONV1, STEM_CONV2, STEM_REDUCE, TABLE
from syncbn.nn import SyncBatchNorm
from syncbn.ops import reference

Activation = Literal["relu"] | None
Shape = tuple[int, int, int, int]
# Of float32 against the float64 oracle. nn.BatchNorm2d itself is off by 3e-5 at 32x64x112x112 channels-last.
TOLERANCE_OURS, TOLERANCE = 1e-5, 1e-4
# Freed memory given back to the system and taken again may cost more than the layer: see `measure`.
KEEP_MEMORY = True
QUICK_SHAPES = {(8, 14): 1, (24, 7): 1}


def layer_shapes() -> dict[tuple[int, int], int]:
    """The activations that Inception-BN normalises at 224 pixels: (C, H = W) -> number of layers. Largest first."""
    found = Counter({(STEM_CONV1, 112): 1})
    found.update([(STEM_REDUCE, 56), (STEM_CONV2, 56)])
    for row in TABLE:
        after = row.size // row.stride
        found.update((C, row.size) for C in (row.conv_1x1, row.reduce_3x3, row.reduce_double_3x3, row.double_3x3) if C)
        found.update((C, after) for C in (row.conv_3x3, row.double_3x3, row.projection) if C)
    return dict(sorted(found.items(), key=lambda item: -item[0][0] * item[0][1] ** 2))


@dataclass(frozen=True)
class Problem:
    """One layer's step: the same numbers on every rank, of which each takes its share.

    Attributes:
        shape: (N, C, H, W) over all ranks.
        memory_format: a key of FORMATS.
        activation: None or "relu".
        rank: this one.
        ranks: P.
    """

    shape: Shape
    memory_format: str = "contiguous"
    activation: Activation = None
    rank: int = 0
    ranks: int = 1

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """X and dy of the whole batch, weight and bias (C)."""
        generator = torch.Generator().manual_seed(0)
        C = self.shape[1]
        x = torch.randn(self.shape, generator=generator).mul_(1.7).add_(0.3)
        dy = torch.randn(self.shape, generator=generator)
        weight = torch.rand(C, generator=generator) + 0.5
        return x, dy, weight, torch.randn(C, generator=generator)

    def share(self, whole: Tensor) -> Tensor:
        """This rank's images."""
        return whole.chunk(self.ranks)[self.rank]

    def laid_out_share(self, whole: Tensor) -> Tensor:
        """This rank's images in the memory format."""
        return self.share(whole).clone(memory_format=FORMATS[self.memory_format])


class TorchBatchNorm(nn.BatchNorm2d):
    """nn.BatchNorm2d, with an nn.ReLU(inplace=True) behind it if asked for."""

    activation: Activation = None

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> the same."""
        y = super().forward(input)
        return F.relu_(y) if self.activation == "relu" else y


def contenders(C: int, section: str, activation: Activation) -> dict[str, _BatchNorm]:
    """Whom the section compares, by name."""
    layers: dict[str, _BatchNorm] = {OURS: SyncBatchNorm(C, activation=activation)}
    if section == "alone":
        layers["nn.BatchNorm2d" + (", ReLU" if activation else "")] = stock = TorchBatchNorm(C)
        stock.activation = activation
        return layers
    for exchange in EXCHANGE:
        for arithmetic in ARITHMETIC:
            name = f"{exchange.replace('_', ' ')}, {arithmetic}"
            layers[name] = PeerBatchNorm(C, exchange=exchange, arithmetic=arithmetic, activation=activation)
    return layers


def step(layer: _BatchNorm, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward; returns y, dx, dweight, dbias."""
    y = layer(x)
    return (y, *torch.autograd.grad(y, (x, layer.weight, layer.bias), dy))


def prepare(layers: Mapping[str, _BatchNorm], problem: Problem) -> tuple[Tensor, Tensor]:
    """Give every layer the problem's parameters, and verify each; returns x and dy of this rank, to time with.

    Raises:
        WrongContender: one of them is off the oracle.
    """
    whole_x, whole_dy, weight, bias = problem.tensors()
    x = problem.laid_out_share(whole_x).requires_grad_()
    dy = problem.laid_out_share(whole_dy)
    found = {}
    for name, layer in layers.items():
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        y, dx, dweight, dbias = (t.detach() for t in step(layer, x, dy))
        if dist.is_initialized():
            for share in (dweight, dbias):
                dist.all_reduce(share)
        found[name] = {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias}
        found[name] |= {n: b.clone() for n, b in layer.named_buffers() if n.startswith("running")}
    errors: dict[str, Counter[str]] = {name: Counter() for name in layers}
    for channels in torch.arange(problem.shape[1]).split(16):  # so that float64 does not take all memory
        whole = (whole_x[:, channels], whole_dy[:, channels], weight[channels], bias[channels])
        expected = oracle(problem, *whole)
        for name, tensors in found.items():
            for quantity, (value, scale) in expected.items():
                tensor = tensors[quantity]
                own = tensor[:, channels] if tensor.dim() > 1 else tensor[channels]
                error = measure.relative_error(own, value, scale)
                errors[name][quantity] = max(errors[name][quantity], error)  # type: ignore[assignment]
    for name in layers:
        measure.verify(name, errors[name], TOLERANCE_OURS if name == OURS else TOLERANCE)
    return x, dy


def oracle(problem: Problem, x: Tensor, dy: Tensor, weight: Tensor, bias: Tensor) -> dict[str, tuple[Tensor, float]]:
    """What a step must find, by name, in float64, and the scale of its error where its own magnitude is none.

    A sum of M terms may happen to be near 0: its error is measured against the root of the sum of squared terms.
    """
    y, mean, var = reference.batch_norm(x, weight, bias, activation=problem.activation)
    gradients = reference.batch_norm_gradients(dy, x, weight, bias, activation=problem.activation)
    M = x.numel() // x.shape[1]
    running_mean, running_var = reference.running_statistics(mean, var, M, torch.zeros(1), torch.ones(1), 0.1)
    typical = dy.double().square().sum((0, 2, 3)).sqrt().max().item()
    return {
        "y": (problem.share(y), 0.0),
        "dx": (problem.share(gradients.x), 0.0),
        "dweight": (gradients.gamma, typical),
        "dbias": (gradients.beta, typical),
        "running_mean": (running_mean, 0.1),
        "running_var": (running_var, 0.0),
    }


def measure_problem(problem: Problem, section: str, rounds: int, warmup: int) -> list[Measurement]:
    """Verify and time all contenders at one shape."""
    layers = contenders(problem.shape[1], section, problem.activation)
    x, dy = prepare(layers, problem)
    times = measure.time_in_turns({name: partial(step, layer, x, dy) for name, layer in layers.items()}, rounds, warmup)
    name = section + (", ReLU" if problem.activation else "")
    return measure.rows_of(name, "x".join(map(str, problem.shape)), problem.memory_format, problem.ranks, times)


def measure_on_rank(
    rank: int, ranks: int, shapes: list[Shape], formats: list[str], activation: Activation, rounds: int, warmup: int
) -> Iterator[list[Measurement]]:
    """What each process runs in part "ranks"."""
    for shape in shapes:
        for memory_format in formats:
            problem = Problem(shape, memory_format, activation, rank, ranks)
            yield measure_problem(problem, "ranks", rounds, warmup)


def over_the_network(rows: list[Measurement], layers: Mapping[tuple[int, int], int]) -> Iterator[str]:
    """Lines that add up the medians over all layers of Inception-BN, not each shape once."""
    totals: dict[tuple[str, int, str], Counter[str]] = {}
    for row in rows:
        _, C, H, _ = map(int, row.shape.split("x"))
        total = totals.setdefault((row.section, row.ranks, row.memory_format), Counter())
        total[row.contender] += row.median * layers[C, H]  # type: ignore[assignment]
    for (section, ranks, memory_format), total in totals.items():
        times = "; ".join(f"{name} {ms:.1f} ms" for name, ms in total.items())
        yield f"{section}, P={ranks}, {memory_format}: over the {sum(layers.values())} layers {times}"


def run(
    part: Literal["both", "alone", "ranks"] = "both",
    batch: int = 32,
    ranks: list[int] = [2, 4],  # noqa: B006 - shown in --help, never changed
    formats: list[Literal["contiguous", "channels_last"]] = ["contiguous", "channels_last"],  # noqa: B006
    activation: Activation = None,
    rounds: int = 15,
    warmup: int = 5,
    threads: int | None = None,
    quick: bool = False,
    output: Path = measure.RESULTS,
) -> None:
    """Time one layer against nn.BatchNorm2d, and on several ranks against the algorithms of others.

    Args:
        part: which comparison.
        batch: images over all ranks; the paper's mini-batch by default.
        ranks: numbers of processes for part "ranks", each with one thread.
        formats: memory formats.
        activation: also apply a ReLU, as Inception-BN does after every layer.
        rounds: timings of each contender that count.
        warmup: rounds before these. With fewer than 5, syncbn's ranks are still making sure that they agree.
        threads: of part "alone"; None for torch's default, the number of cores.
        quick: a smoke run on two small shapes.
        output: folder for the CSV and the figure of each part.

    Raises:
        ValueError: `batch` does not divide among the ranks.
    """
    console = report.console()
    layers = layer_shapes()
    if quick:
        layers, batch, rounds, warmup = QUICK_SHAPES, min(batch, 8), 2, 0
        threads = threads or 1
    for P in ranks:
        if batch % P:
            raise ValueError(f"--layer.batch {batch} does not divide among {P} ranks: take a multiple of {P}")
    torch.set_num_threads(threads or torch.get_num_threads())
    shapes = [(batch, C, side, side) for C, side in layers]
    for name in ("alone", "ranks") if part == "both" else (part,):
        rows: list[Measurement] = []
        processes = [1] if name == "alone" else ranks
        with report.progress(console) as bar:
            task = bar.add_task(name, total=len(shapes) * len(formats) * len(processes))
            for P in processes:
                arguments = (shapes, list(formats), activation, rounds, warmup)
                if name == "alone":
                    found: Iterator[list[Measurement]] = (
                        measure_problem(Problem(shape, memory_format, activation), name, rounds, warmup)
                        for shape in shapes
                        for memory_format in formats
                    )
                else:
                    found = run_ranks(measure_on_rank, P, P, *arguments)
                for more in found:
                    rows += more
                    last = f"{name}, P={P}: {more[0].shape}, {more[0].memory_format}"
                    bar.update(task, advance=1, description=last)
        used = torch.get_num_threads() if name == "alone" else 1
        title = f'One layer, part "{name}": forward and backward, float32, {used} thread(s) a rank'
        report.publish_results(
            rows, output, f"layer-{name}" + ("-relu" if activation else ""), report.titled(title, quick), used, console
        )
        for line in over_the_network(rows, layers):
            console.print(line, soft_wrap=True)
