"""One layer with its ReLU on a GPU, against the floor of the memory's bandwidth and stock layers. See `gpu`."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as TorchSyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.benchmarks.gpu.timing import captured, on_capture_stream, time_in_turns
from syncbn.benchmarks.harness import measure
from syncbn.benchmarks.harness.measure import FORMATS, OURS, Measurement
from syncbn.benchmarks.layer import Shape
from syncbn.nn import SyncBatchNorm
from syncbn.ops import reference

FLOOR, CUDNN, COMPILED, STOCK_SYNC = "floor", "nn.BatchNorm2d", "nn.BatchNorm2d, compiled", "nn.SyncBatchNorm"
GROUP_OF_ONE = f"{OURS}, group of one"
TENSORS_MOVED = {"forward": 3, "backward": 5}
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-4}


class OverGroupOfOne(SyncBatchNorm):
    """Which synchronises though there is nobody else."""

    def _group(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD


class StockBatchNorm(nn.BatchNorm2d):
    """With a ReLU behind it."""

    activation = "relu"  # says so to a `ConvNorm`

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> the same."""
        return F.relu(super().forward(input), inplace=True)


class StockSyncBatchNorm(nn.BatchNorm2d):
    """nn.SyncBatchNorm's synchronised path, which it does not take in a group of one, with a ReLU behind it."""

    activation = "relu"

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> the same."""
        averages = (self.running_mean, self.running_var)
        settings = (self.eps, self.momentum, dist.group.WORLD, 1)
        return F.relu(TorchSyncBatchNorm.apply(input, self.weight, self.bias, *averages, *settings), inplace=True)


def stock(kind: type[nn.BatchNorm2d], bn: _BatchNorm) -> nn.BatchNorm2d:
    """A stock layer like one of syncbn's."""
    return kind(bn.num_features, bn.eps, cast(float, bn.momentum), device=bn.weight.device)


class TimingOptions(NamedTuple):
    """How to time.

    Attributes:
        device: "cuda", or "cpu" for a dry run.
        dtype: of the activations.
        graphs: replay CUDA graphs.
        rounds: that count.
        warmup: rounds before these.
        bandwidth: bytes a second of a copy.
    """

    device: str
    dtype: torch.dtype
    graphs: bool
    rounds: int
    warmup: int
    bandwidth: float


def contenders(C: int, device: str, compiled: bool) -> dict[str, _BatchNorm]:
    """Whom the section compares, by name, with equal parameters: all but the compiled one, or that and syncbn."""
    layers: dict[str, _BatchNorm] = {OURS: SyncBatchNorm(C, activation="relu", device=device)}
    if compiled:
        layers[COMPILED] = StockBatchNorm(C, device=device)
        layers[COMPILED].compile(dynamic=False)
    else:
        layers[GROUP_OF_ONE] = OverGroupOfOne(C, activation="relu", device=device)
        layers[CUDNN] = StockBatchNorm(C, device=device)
        if device != "cpu":  # nn.SyncBatchNorm has no path there
            layers[STOCK_SYNC] = StockSyncBatchNorm(C, device=device)
    generator = torch.Generator().manual_seed(0)
    weight, bias = torch.rand(C, generator=generator) + 0.5, torch.randn(C, generator=generator)
    with torch.no_grad():
        for layer in layers.values():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    return layers


def verify(layers: Mapping[str, _BatchNorm], x: Tensor, dy: Tensor) -> None:
    """Refuse a contender that is off the float64 oracle.

    Raises:
        measure.WrongContender: naming it.
    """
    parameters = (layers[OURS].weight.detach(), layers[OURS].bias.detach())
    expected = reference.batch_norm(x.detach(), *parameters, activation="relu").y
    true = reference.batch_norm_gradients(dy, x.detach(), *parameters, activation="relu")
    for name, layer in layers.items():
        y = layer(x)
        dx, dweight = torch.autograd.grad(y, (x, layer.weight), dy)
        errors = {"y": measure.relative_error(y, expected), "dx": measure.relative_error(dx, true.x)}
        errors["dweight"] = measure.relative_error(dweight, true.gamma)
        measure.verify(name, errors, TOLERANCE[x.dtype])


def forward_of(layer: _BatchNorm, x: Tensor) -> Callable[[], Any]:
    """What to time of the forward."""
    return partial(layer, x)


def backward_of(layer: _BatchNorm, x: Tensor, dy: Tensor) -> Callable[[], Any]:
    """What to time of the backward. A forward of the same layer spoils it."""
    return partial(torch.autograd.grad, layer(x), (x, layer.weight, layer.bias), dy, retain_graph=True)


def normal(shape: Sequence[int], memory_format: str, options: TimingOptions, generator: torch.Generator) -> Tensor:
    """An activation of normal numbers."""
    numbers = torch.randn(tuple(shape), generator=generator, device=options.device)
    return numbers.to(options.dtype, memory_format=FORMATS[memory_format])


def time_prepared(
    prepare: Mapping[str, Callable[[], Callable[[], Any]]], options: TimingOptions
) -> dict[str, list[float]]:
    """Time in turns, by contender, what each of `prepare` returns; replayed as CUDA graphs where the options say so."""
    with on_capture_stream(options.device) if options.graphs else nullcontext():
        runs = {name: make() for name, make in prepare.items()}
    if options.graphs:
        runs = {name: captured(run, options.device) for name, run in runs.items()}
    return time_in_turns(runs, options.rounds, options.warmup, options.device)


def measure_shape(shape: Shape, memory_format: str, options: TimingOptions, compiled: bool) -> list[Measurement]:
    """Verify and time the contenders at one shape, both directions."""
    torch.compiler.reset()  # else it gives up compiling after a few shapes
    generator = torch.Generator(options.device).manual_seed(0)
    x, dy = (normal(shape, memory_format, options, generator) for _ in range(2))
    layers = contenders(shape[1], options.device, compiled)
    verify(layers, x.requires_grad_(), dy)
    rows: list[Measurement] = []
    for direction, tensors in TENSORS_MOVED.items():
        if direction == "forward":
            prepare = {name: partial(forward_of, layer, x) for name, layer in layers.items()}
        else:
            prepare = {name: partial(backward_of, layer, x, dy) for name, layer in layers.items()}
        times = time_prepared(prepare, options)
        if not compiled:
            times[FLOOR] = [tensors * x.nbytes / options.bandwidth * 1e3] * options.rounds
        rows += measure.rows_of(direction, "x".join(map(str, shape)), memory_format, 1, times)
    return [row for row in rows if not (compiled and row.contender == OURS)]  # whose row comes with the others
