"""A training step of Inception-BN on one GPU: bfloat16 autocast, channels-last, beside stock layers. See `gpu`."""

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from syncbn.benchmarks.gpu.layer import (
    CUDNN,
    GROUP_OF_ONE,
    STOCK_SYNC,
    OverGroupOfOne,
    StockBatchNorm,
    StockSyncBatchNorm,
    stock,
)
from syncbn.benchmarks.gpu.timing import captured, time_in_turns
from syncbn.benchmarks.harness import measure
from syncbn.benchmarks.harness.live_tensors import MEBIBYTE, live_bytes
from syncbn.benchmarks.harness.measure import FORMATS, OURS, Measurement
from syncbn.benchmarks.harness.peers import stock_inception
from syncbn.benchmarks.step import CLASSES, OracleNorm, state_and_gradients
from syncbn.models import InceptionBN, inception_bn
from syncbn.nn import SyncBatchNorm

GRAPH, COMPILED = f"{OURS}, CUDA graph", f"{OURS}, compiled"
KEPT = f"{OURS}, activations kept"
CADENE = f"{CUDNN}, Cadene layout"
IMAGES_PER_SECOND, PEAK_MEMORY = "images/s", "MiB at most"
VERIFIED_PIXELS, VERIFIED_IMAGES, TOLERANCE = 96, 2, 1e-7


class StepSetting(NamedTuple):
    """What is trained: `batch` images of `pixels`, all channel counts times `width`."""

    batch: int
    pixels: int
    width: float
    device: str

    def __str__(self) -> str:
        return f"step, {self.batch} x {self.pixels} px"

    def network(self, variant: str = "paper") -> InceptionBN:
        """The same for every contender."""
        torch.manual_seed(0)
        network = inception_bn(CLASSES, variant=variant, width_multiplier=self.width)
        return network.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def data(self) -> tuple[Tensor, Tensor]:
        """Images and labels."""
        generator = torch.Generator(self.device).manual_seed(1)
        options: Any = {"generator": generator, "device": self.device}
        images = torch.randn(self.batch, 3, self.pixels, self.pixels, **options)
        return images.contiguous(memory_format=FORMATS["channels_last"]), torch.randint(
            CLASSES, (self.batch,), **options
        )


def over_group_of_one(network: InceptionBN) -> InceptionBN:
    """The network, each layer of which synchronises though there is nobody else."""
    for module in network.modules():
        if isinstance(module, SyncBatchNorm):
            module.__class__ = OverGroupOfOne
    return network


def makers(setting: StepSetting) -> dict[str, Callable[[], InceptionBN]]:
    """Builds each contender's network; all but the last are the same function."""

    def ours() -> InceptionBN:
        network = setting.network()
        network.recompute_activations = True
        return network

    def with_stock(kind: Any, variant: str = "paper") -> InceptionBN:
        return stock_inception(setting.network(variant), partial(stock, kind))

    found: dict[str, Callable[[], InceptionBN]] = {
        OURS: ours,
        KEPT: setting.network,
        GROUP_OF_ONE: lambda: over_group_of_one(ours()),
        CUDNN: lambda: with_stock(StockBatchNorm),
    }
    if setting.device != "cpu":  # nn.SyncBatchNorm has no path there
        found[STOCK_SYNC] = partial(with_stock, StockSyncBatchNorm)
    found[CADENE] = partial(with_stock, StockBatchNorm, "cadene")
    return found


class TrainingStep:
    """Forward, loss, backward and update, with nothing in it that waits for the device or that a graph cannot hold.

    Args:
        network: to be trained, in place.
        images: (N, 3, H, W).
        labels: (N).
        fused: whether the optimiser updates all parameters in one kernel.
    """

    def __init__(self, network: InceptionBN, images: Tensor, labels: Tensor, fused: bool) -> None:
        self.network, self.images, self.labels = network, images, labels
        self.optimizer = torch.optim.SGD(
            network.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4, fused=True if fused else None
        )

    def __call__(self) -> Tensor:
        """One step; returns the loss."""
        self.optimizer.zero_grad()
        # Each weight is used once in a step, so that a cache of casts brings nothing; and no graph can hold one.
        with torch.autocast(self.images.device.type, torch.bfloat16, cache_enabled=False):
            loss = F.cross_entropy(self.network(self.images), self.labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()


def build(name: str, setting: StepSetting) -> Callable[[], Any]:
    """A contender's step, ready to be timed. Whoever is stock has a stock optimiser, too."""
    base = OURS if name in (GRAPH, COMPILED) else name
    network = makers(setting)[base]()
    step = TrainingStep(network, *setting.data(), fused=base in (OURS, KEPT, GROUP_OF_ONE))
    if name == COMPILED:
        network.compile(fullgraph=True, dynamic=False)
    return captured(step, setting.device) if name == GRAPH else step


def verify(setting: StepSetting) -> None:
    """Check the gradients and statistics of each network in float64, on small images, against the float64 oracle.

    Raises:
        measure.WrongContender: one of them is off.
    """
    setting = setting._replace(batch=VERIFIED_IMAGES, pixels=min(setting.pixels, VERIFIED_PIXELS))
    images, labels = setting.data()
    images = images.double()
    expected: dict[str, dict[str, Tensor]] = {}
    for name, make in makers(setting).items():
        variant = "cadene" if name == CADENE else "paper"
        if variant not in expected:
            oracle = stock_inception(setting.network(variant).double(), OracleNorm)
            F.cross_entropy(oracle(images), labels).backward()
            expected[variant] = state_and_gradients(oracle)
        network = make().double()
        F.cross_entropy(network(images), labels).backward()
        found = state_and_gradients(network)
        # A bias before a norm has no effect: its gradient is what rounding leaves of 0.
        errors = {
            what: measure.relative_error(found[what], value, scale=1e-3) for what, value in expected[variant].items()
        }
        measure.verify(name, errors, TOLERANCE)


def measure_step(setting: StepSetting, names: list[str], rounds: int, warmup: int) -> list[Measurement]:
    """Time a step of each contender; the first must be syncbn."""
    steps = {name: build(name, setting) for name in names}
    times = time_in_turns(steps, rounds, warmup, setting.device)
    rows = measure.rows_of("step", str(setting), "channels_last", 1, times)
    for row in rows[:]:
        rates = [setting.batch / ms * 1e3 for ms in times[row.contender]]
        p20, median, p80 = (measure.percentile(rates, q) for q in (0.2, 0.5, 0.8))
        rows.append(replace(row, median=median, p20=p20, p80=p80, unit=IMAGES_PER_SECOND))
    return rows


def measure_memory(setting: StepSetting, names: list[str]) -> list[Measurement]:
    """The most memory that tensors take in a step of each contender, parameters and optimiser among it."""
    peak = peak_on_gpu if setting.device == "cuda" else peak_on_cpu
    found = {name: peak(partial(build, name, setting)) / MEBIBYTE for name in names}
    return [
        Measurement("step", str(setting), "channels_last", 1, name, v, v, v, found[OURS] / v, PEAK_MEMORY)
        for name, v in found.items()
    ]


def peak_on_gpu(make: Callable[[], Callable[[], Any]]) -> float:
    """Bytes at the most during a step, less what was taken before `make` built it."""
    gc.collect()
    before = torch.cuda.memory_allocated()
    step = make()
    for _ in range(2):
        step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def peak_on_cpu(make: Callable[[], Callable[[], Any]]) -> float:
    """The same of a CPU, but for what kernels take for themselves."""
    return max(live_bytes(make))
