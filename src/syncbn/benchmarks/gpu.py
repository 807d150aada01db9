"""One layer with its ReLU on a GPU, at every activation shape of Inception-BN, against the floor and stock layers.

    syncbn benchmark --section gpu
    syncbn benchmark --section gpu --gpu.batches [32] --gpu.graphs true

Contenders: syncbn alone and over an NCCL group of one, nn.BatchNorm2d (cuDNN) in eager and under torch.compile, and
nn.SyncBatchNorm over the NCCL group of one, forced through its synchronised path, each followed by a ReLU.
The floor is the time in which the bytes that must move do move, at the bandwidth of a copy measured in the same run:
3 tensors forward (x is read twice, y written), 5 backward (dy and x are read twice, dx written). An activation that
fits into the cache may be faster than that.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch._functorch.config as functorch_config
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as TorchSyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.benchmarks import measure
from syncbn.benchmarks.layer import Shape, layer_shapes
from syncbn.benchmarks.measure import FORMATS, OURS, Row
from syncbn.nn import SyncBatchNorm
from syncbn.ops import reference

KEEP_MEMORY = False
FLOOR, COMPILED = "floor", "nn.BatchNorm2d, compiled"
TENSORS_MOVED = {"forward": 3, "backward": 5}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 2e-3, torch.float32: 1e-4}
COPY_BYTES = 2**30
LEAST_MS = 2.0
MOST_REPEATS = 200


class OverGroupOfOne(SyncBatchNorm):
    """Which synchronises though there is nobody else."""

    def _group(self) -> dist.ProcessGroup | None:
        return dist.group.WORLD


class StockBatchNorm(nn.BatchNorm2d):
    """With a ReLU behind it."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> the same."""
        return F.relu(super().forward(input), inplace=True)


class StockSyncBatchNorm(nn.BatchNorm2d):
    """nn.SyncBatchNorm's synchronised path, which it does not take in a group of one, with a ReLU behind it."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> the same."""
        averages = (self.running_mean, self.running_var)
        settings = (self.eps, self.momentum, dist.group.WORLD, 1)
        return F.relu(TorchSyncBatchNorm.apply(input, self.weight, self.bias, *averages, *settings), inplace=True)


def contenders(C: int, device: str) -> dict[str, _BatchNorm]:
    """Whom the section compares, by name, with equal parameters."""
    layers: dict[str, _BatchNorm] = {
        OURS: SyncBatchNorm(C, activation="relu", device=device),
        f"{OURS}, group of one": OverGroupOfOne(C, activation="relu", device=device),
        "nn.BatchNorm2d": StockBatchNorm(C, device=device),
        COMPILED: StockBatchNorm(C, device=device),
        "nn.SyncBatchNorm": StockSyncBatchNorm(C, device=device),
    }
    layers[COMPILED].compile(dynamic=False)
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


def captured(run: Callable[[], Any]) -> Callable[[], None]:
    """The same as a CUDA graph, which leaves out what the host needs to launch it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(4):  # ranks have agreed, and kernels are compiled
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def time_in_turns(runs: Mapping[str, Callable[[], Any]], rounds: int, warmup: int) -> dict[str, list[float]]:
    """Milliseconds of each round, by contender: of the device, between two events around some calls."""
    for run in runs.values():
        run()
    first = min(_milliseconds(run, 3) for run in runs.values())
    repeats = min(MOST_REPEATS, max(1, math.ceil(LEAST_MS / first)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warmup + rounds):
        for name, run in runs.items():
            taken = _milliseconds(run, repeats)
            if turn >= warmup:
                times[name].append(taken)
    return times


def copy_bandwidth(rounds: int) -> float:
    """Bytes a second, read and written, of a copy too large for any cache."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = time_in_turns({"copy": lambda: target.copy_(source)}, rounds, 2)["copy"]
    return 2 * COPY_BYTES / (measure.percentile(times, 0.5) * 1e-3)


def measure_shape(
    shape: Shape, memory_format: str, dtype: torch.dtype, bandwidth: float, options: Mapping[str, Any]
) -> Iterator[Row]:
    """Verify and time all contenders at one shape, both directions."""
    torch.compiler.reset()  # else it gives up compiling after a few shapes
    generator = torch.Generator().manual_seed(0)
    x, dy = (
        torch.randn(shape, generator=generator).to(options["device"], dtype, memory_format=FORMATS[memory_format])
        for _ in range(2)
    )
    layers = contenders(shape[1], options["device"])
    verify(layers, x.requires_grad_(), dy)
    for direction, tensors in TENSORS_MOVED.items():
        if direction == "forward":
            runs = {name: forward_of(layer, x) for name, layer in layers.items()}
        else:
            runs = {name: backward_of(layer, x, dy) for name, layer in layers.items()}
        if options["graphs"]:
            runs = {name: captured(run) for name, run in runs.items()}
        times = time_in_turns(runs, options["rounds"], options["warmup"])
        times[FLOOR] = [tensors * x.numel() * x.element_size() / bandwidth * 1e3] * options["rounds"]
        yield from measure.rows_of(direction, "x".join(map(str, shape)), memory_format, 1, times)


def run(
    batches: list[int] = [256, 32],  # noqa: B006 - shown in --help, never changed
    formats: list[Literal["contiguous", "channels_last"]] = ["channels_last"],  # noqa: B006
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    graphs: bool = False,
    rounds: int = 15,
    warmup: int = 3,
    quick: bool = False,
    output: Path = measure.RESULTS,
) -> None:
    """Time one layer on a GPU against the floor of the memory's bandwidth, and stock layers.

    Args:
        batches: images.
        formats: memory formats.
        dtype: of the activations; parameters are float32.
        graphs: replay CUDA graphs, so that the host's part is left out.
        rounds: timings of each contender that count.
        warmup: rounds before these.
        quick: a smoke run on two small shapes.
        output: folder for the CSV and the figure.

    Raises:
        ValueError: there is no GPU that CUDA and NCCL can use.
    """
    if not (torch.cuda.is_available() and dist.is_nccl_available()):
        raise ValueError("--section gpu needs an NVIDIA GPU, CUDA and NCCL, and found none: run it where they are")
    console = measure.console()
    shapes = [(N, C, side, side) for N in batches for C, side in layer_shapes()]
    if quick:
        shapes, rounds, warmup = [(8, 64, 14, 14), (8, 192, 7, 7)], 2, 1
    # Backwards are timed again and again, so that what a compiled one reads must be left to it.
    with group_of_one(), functorch_config.patch(donated_buffer=False):
        bandwidth = copy_bandwidth(rounds)
        console.print(f"{torch.cuda.get_device_name()}: a copy moves {bandwidth / 1e12:.2f} TB/s")
        options = {"device": "cuda", "graphs": graphs, "rounds": rounds, "warmup": warmup}
        rows = _measure_all(shapes, list(formats), DTYPES[dtype], bandwidth, options, console)
    title = f"One layer with ReLU, {dtype}, {torch.cuda.get_device_name()}, a copy moves {bandwidth / 1e12:.2f} TB/s"
    name = "-".join(["gpu", torch.cuda.get_device_name().replace(" ", "-"), dtype, *(["graphs"] if graphs else [])])
    measure.publish(rows, output, name, title, torch.get_num_threads(), console)


@contextmanager
def group_of_one() -> Iterator[None]:
    """A process group over NCCL that holds this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(str(Path(folder) / "store"), 1)
        dist.init_process_group("nccl", store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()


def _measure_all(
    shapes: list[Shape],
    formats: list[str],
    dtype: torch.dtype,
    bandwidth: float,
    options: Mapping[str, Any],
    console: Console,
) -> list[Row]:
    rows: list[Row] = []
    with measure.progress(console) as bar:
        task = bar.add_task("gpu", total=len(shapes) * len(formats))
        for shape in shapes:
            for memory_format in formats:
                rows += measure_shape(shape, memory_format, dtype, bandwidth, options)
                bar.update(task, advance=1, description=f"gpu: {rows[-1].shape}, {memory_format}")
    return rows


def _milliseconds(run: Callable[[], Any], repeats: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repeats):
        run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / repeats
