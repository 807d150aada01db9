"""A whole training step of Inception-BN on P ranks: forward, loss, backward, gradients averaged, SGD; in float32.

    syncbn benchmark --section step
    syncbn benchmark --section step --step.pixels [224] --step.batch [4] --step.width [1.0] --step.rounds 20

Contenders are the same network, with the same parameters, under the same DistributedDataParallel:
- "syncbn": as `syncbn.models` runs it, branches sharing their messages, 1x1 convolutions on one input fused;
- "per layer": syncbn's layers in stock order, each convolution and norm by itself;
- "all gather, passes": stock order, one all-gather of peers.py for each layer, on syncbn's passes. Only how the
  network runs and what the layers send is different;
- "all gather, plain": stock order, all-gather, ordinary torch operators: what others would run on a CPU;
- "all gather, passes, fused convolutions": as the third, but the 1x1 convolutions stay fused.
"""

import copy
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from syncbn.benchmarks.harness import measure, report
from syncbn.benchmarks.harness.measure import FORMATS, OURS, Measurement
from syncbn.benchmarks.harness.messages import recorded
from syncbn.benchmarks.harness.peers import Arithmetic, PeerBatchNorm, stock_inception
from syncbn.benchmarks.harness.world import run_ranks
from syncbn.models import InceptionBN, inception_bn
from syncbn.ops import reference

TOLERANCE = 1e-7  # in float64: the algorithms are compared, not how a deep network amplifies rounding
CLASSES = 1000
KEEP_MEMORY = False
SMALL_STEM_BELOW = 64  # pixels


@dataclass(frozen=True)
class Setting:
    """What is trained: images of `pixels`, `batch` of them on each rank, all channel counts times `width`."""

    pixels: int
    batch: int
    width: float
    memory_format: str = "contiguous"

    def __str__(self) -> str:
        return f"{self.batch} x {self.pixels} px, width {self.width:g}"

    def network(self) -> InceptionBN:
        """The same on every rank; with the stem for small images where they are small."""
        torch.manual_seed(0)
        stem = "small" if self.pixels < SMALL_STEM_BELOW else "imagenet"
        network = inception_bn(CLASSES, width_multiplier=self.width, stem=stem)
        return network.to(memory_format=FORMATS[self.memory_format])  # type: ignore[call-overload]

    def whole_batch(self, ranks: int) -> tuple[Tensor, Tensor]:
        """Images and labels of all ranks."""
        generator = torch.Generator().manual_seed(1)
        images = torch.randn(ranks * self.batch, 3, self.pixels, self.pixels, generator=generator)
        labels = torch.randint(CLASSES, (ranks * self.batch,), generator=generator)
        return images.contiguous(memory_format=FORMATS[self.memory_format]), labels


def gathering(arithmetic: Arithmetic, bn: _BatchNorm) -> PeerBatchNorm:
    """The peer that takes a SyncBatchNorm's place."""
    momentum, activation = cast(float, bn.momentum), cast("str | None", bn.activation)
    return PeerBatchNorm(
        bn.num_features, bn.eps, momentum, exchange="all_gather", arithmetic=arithmetic, activation=activation
    )


Makers: TypeAlias = dict[str, Callable[[InceptionBN], InceptionBN]]
CONTENDERS: Makers = {
    OURS: lambda network: network,
    "per layer": stock_inception,
    "all gather, passes": partial(stock_inception, make_norm=partial(gathering, "passes")),
    "all gather, plain": partial(stock_inception, make_norm=partial(gathering, "plain")),
    "all gather, passes, fused convolutions": partial(
        stock_inception, make_norm=partial(gathering, "passes"), fused_convolutions=True
    ),
}
"""From a network to the same network as each contender runs it."""


class Trainer:
    """One contender's training step."""

    def __init__(self, network: InceptionBN) -> None:
        with warnings.catch_warnings():  # torch 2.13 has another name for broadcast_buffers, older ones have not
            warnings.simplefilter("ignore", FutureWarning)
            self.network = DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)
        self.optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Forward, loss, backward with the gradients averaged over the ranks, update."""
        self.optimizer.zero_grad()
        self.backward(images, labels)
        self.optimizer.step()

    def backward(self, images: Tensor, labels: Tensor) -> Tensor:
        """Forward and backward; returns the logits."""
        logits = self.network(images)
        F.cross_entropy(logits, labels).backward()
        return logits


class OracleNorm(nn.Module):
    """The float64 oracle as a layer, in one process with the whole batch."""

    def __init__(self, bn: _BatchNorm) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(bn.weight.detach()), nn.Parameter(bn.bias.detach())
        self.eps, self.momentum, self.activation = bn.eps, cast(float, bn.momentum), cast("str | None", bn.activation)
        for name, buffer in bn.named_buffers():
            self.register_buffer(name, buffer.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Algorithm 1."""
        y, mean, var = reference.batch_norm(x, self.weight, self.bias, self.eps, activation=self.activation)
        running = cast(Tensor, self.running_mean), cast(Tensor, self.running_var)
        with torch.no_grad():
            new = reference.running_statistics(mean, var, x.numel() // x.shape[1], *running, self.momentum)
            for buffer, value in zip(running, new, strict=True):
                buffer.copy_(value)
        return y


def verify(setting: Setting, rank: int, ranks: int, makers: Makers = CONTENDERS) -> None:
    """Check one step of each contender: logits, gradients of images and parameters, running statistics.

    In float64, on at most two images a rank of at most 96 pixels, against the same network on `syncbn.ops.reference`.

    Raises:
        WrongContender: one of them is off.
    """
    setting = replace(setting, batch=min(setting.batch, 2), pixels=min(setting.pixels, 96))
    network = setting.network().double()
    whole, labels = setting.whole_batch(ranks)
    whole = whole.double().requires_grad_()
    oracle = stock_inception(network, OracleNorm)
    expected_logits = oracle(whole)
    F.cross_entropy(expected_logits, labels).backward()
    expected = {
        "logits": expected_logits.detach().chunk(ranks)[rank],
        "dimages": cast(Tensor, whole.grad).chunk(ranks)[rank] * ranks,  # of this rank's mean loss, not of all images'
        **state_and_gradients(oracle),
    }
    for name, make in makers.items():
        images = whole.detach().chunk(ranks)[rank].requires_grad_()
        contender = make(copy.deepcopy(network))
        logits = Trainer(contender).backward(images, labels.chunk(ranks)[rank])
        found = {"logits": logits, "dimages": images.grad, **state_and_gradients(contender)}
        assert found.keys() == expected.keys()
        errors = {what: measure.relative_error(cast(Tensor, found[what]), expected[what]) for what in expected}
        measure.verify(name, errors, TOLERANCE)


def state_and_gradients(network: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters' gradients and of the running statistics."""
    gradients = {f"d{name}": cast(Tensor, p.grad).clone() for name, p in network.named_parameters()}
    return gradients | {name: b.clone() for name, b in network.named_buffers() if "running" in name}


def messages(trainer: Trainer, images: Tensor, labels: Tensor) -> Counter[str]:
    """Collectives of the normalisation in one step, and the bytes that each rank receives by them."""
    trainer.optimizer.zero_grad()
    with recorded() as forward:
        loss = F.cross_entropy(trainer.network(images), labels)
    with recorded() as backward:
        loss.backward()
    totals: Counter[str] = Counter()
    for direction, sent in (("forward", forward), ("backward", backward)):
        totals[f"collectives {direction}"] = len(sent)
        totals[f"bytes {direction}"] = sum(message.received for message in sent)
    return totals


def measure_on_rank(
    rank: int, ranks: int, settings: list[Setting], rounds: int, warmup: int
) -> Iterator[list[Measurement]]:
    """What each process runs."""
    for setting in settings:
        verify(setting, rank, ranks)
        images, labels = (t.chunk(ranks)[rank] for t in setting.whole_batch(ranks))
        trainers = {name: Trainer(make(setting.network())) for name, make in CONTENDERS.items()}
        steps = {name: partial(trainer.step, images, labels) for name, trainer in trainers.items()}
        times = measure.time_in_turns(steps, rounds, warmup)
        rows = measure.rows_of("step", str(setting), setting.memory_format, ranks, times)
        counts = {name: messages(trainer, images, labels) for name, trainer in trainers.items()}
        for name, totals in counts.items():
            for unit, n in totals.items():
                rows.append(
                    replace(rows[0], contender=name, median=n, p20=n, p80=n, ratio=counts[OURS][unit] / n, unit=unit)
                )
        yield rows


def show_messages(rows: list[Measurement], console: Console) -> None:
    """Print collectives and bytes of the last setting; bytes depend on the width alone."""
    counts = [row for row in rows if row.unit != "ms" and row.shape == rows[-1].shape]
    units = list(dict.fromkeys(row.unit for row in counts))
    table = Table("contender", title=f"Messages of the normalisation, per step and rank: {rows[-1].shape}")
    for unit in units:
        table.add_column(unit, justify="right")
    for name in dict.fromkeys(row.contender for row in counts):
        found = {row.unit: f"{row.median:,.0f}" for row in counts if row.contender == name}
        table.add_row(name, *(found[unit] for unit in units))
    console.print(table)


def run(
    pixels: list[int] = [28, 64, 96, 224],  # noqa: B006 - shown in --help, never changed
    batch: list[int] = [64, 8, 8, 4],  # noqa: B006
    width: list[float] = [0.125, 1.0, 1.0, 1.0],  # noqa: B006
    formats: list[Literal["contiguous", "channels_last"]] = ["contiguous", "channels_last"],  # noqa: B006
    ranks: int = 2,
    rounds: int = 11,
    warmup: int = 2,
    quick: bool = False,
    output: Path = measure.RESULTS,
) -> None:
    """Time a training step of Inception-BN against the same network with one all-gather per layer.

    Args:
        pixels: size of the images, one for each setting. The first default is the network of `make train`.
        batch: images of each rank, one for each setting.
        width: multiplier of all channel counts, one for each setting.
        formats: memory formats, of images and weights.
        ranks: processes, each with one thread.
        rounds: timings of each contender that count.
        warmup: rounds before these.
        quick: a smoke run of one small setting in one format.
        output: folder for the CSV and the figure.

    Raises:
        ValueError: not as many values of one of the first three as of the others.
    """
    console = report.console()
    if quick:
        pixels, batch, width, formats, rounds, warmup = [32], [2], [0.125], formats[:1], 1, 0
    if not len(pixels) == len(batch) == len(width):
        given = f"--step.pixels {pixels} --step.batch {batch} --step.width {width}"
        raise ValueError(f"one value for each setting: got {given}")
    settings = [Setting(*s, f) for s in zip(pixels, batch, width, strict=True) for f in formats]
    rows: list[Measurement] = []
    with report.progress(console) as bar:
        task = bar.add_task("Inception-BN", total=len(settings))
        for more in run_ranks(measure_on_rank, ranks, ranks, settings, rounds, warmup):
            rows += more
            bar.update(task, advance=1, description=f"{more[0].shape}, {more[0].memory_format}")
    title = f"Training step of Inception-BN, {ranks} ranks of one thread, float32"
    report.publish_results(rows, output, "step", report.titled(title, quick), 1, console)
    show_messages(rows, console)
