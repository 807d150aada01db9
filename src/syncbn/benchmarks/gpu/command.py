"""syncbn's kernels and a training step of Inception-BN on one GPU, against the memory's bandwidth and stock layers.

    syncbn benchmark --section gpu                          # every figure, in less than nine minutes
    syncbn benchmark --section gpu --gpu.batches [32] --gpu.graphs true --gpu.parts [layer]
    syncbn benchmark --section gpu --gpu.device cpu --quick # a dry run of the code, where there is no GPU

Part "step": forward, loss, backward and update at 224 pixels, bfloat16 autocast, channels-last. Contenders: syncbn,
with its activations kept, over an NCCL group of one, and replayed as one CUDA graph; stock layers branch by branch with
nn.SyncBatchNorm over the group of one, forced through its synchronised path, and with nn.BatchNorm2d (cuDNN) in the
Cadene layout; if time is left, syncbn under torch.compile. Peak memory of each, measured by itself.

Part "layer": one layer with its ReLU at every activation shape of Inception-BN. Contenders: syncbn, over the group of
one, nn.BatchNorm2d in eager and, if time is left, under torch.compile, nn.SyncBatchNorm as above.
The floor is the time in which the bytes that must move do move, at the bandwidth of a copy measured in the same run:
3 tensors forward (x is read twice, y written), 5 backward (dy and x are read twice, dx written). An activation that
fits into the cache may be faster than that.

Part "pool": each max pool of Inception-BN, syncbn's and F.max_pool2d's.

For all contenders cuDNN tries its convolutions out and takes the fastest, as `syncbn fit` has it do.
Whatever is timed is verified first, and written to the CSV at once. What fails is named, and the rest goes on.
"""

import math
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch._functorch.config as functorch_config
import torch.distributed as dist
from rich.console import Console

from syncbn.benchmarks.gpu.layer import TimingOptions, measure_shape
from syncbn.benchmarks.gpu.pool import Pool, measure_pool, pools
from syncbn.benchmarks.gpu.step import (
    CADENE,
    COMPILED,
    GRAPH,
    GROUP_OF_ONE,
    KEPT,
    STOCK_SYNC,
    StepSetting,
    measure_memory,
    measure_step,
    verify,
)
from syncbn.benchmarks.gpu.targets import show_targets
from syncbn.benchmarks.gpu.timing import copy_bandwidth
from syncbn.benchmarks.harness import measure, report
from syncbn.benchmarks.harness.measure import OURS, Measurement
from syncbn.benchmarks.layer import layer_shapes

KEEP_MEMORY = False
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
COMPILING_A_NETWORK = 150.0  # seconds that must be left to begin with it
COMPILING_A_LAYER = 15.0
QUICK_SHAPES = [(8, 64, 14, 14)]
QUICK_POOLS = [Pool(8, 64, 14, 2), Pool(8, 64, 7, 1)]

Part = Literal["step", "layer", "pool"]


class Session:
    """What has been measured, kept on disk, and how much time is left.

    Args:
        path: of the CSV.
        seconds: in all.
        console: where results are printed as they come.
    """

    def __init__(self, path: Path, seconds: float, console: Console) -> None:
        self.path, self.console = path, console
        self.end = time.monotonic() + seconds
        self.rows: list[Measurement] = []
        self.failed: list[str] = []
        self.left_out: list[str] = []

    def measure(self, what: str, run: Callable[[], list[Measurement]], needs: float = 0.0) -> None:
        """Add the rows of `run`, unless fewer than `needs` seconds are left."""
        if self.end - time.monotonic() < needs:
            self.left_out.append(what)
            return
        start = time.monotonic()
        try:
            rows = run()
        except Exception as error:  # a figure that cannot be had must not cost those that can
            self.failed.append(f"{what} ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})")
            self.console.print(traceback.format_exc(), markup=False, highlight=False)
            return
        self.rows += rows
        report.write_csv(self.rows, self.path, torch.get_num_threads())
        best = ", ".join(f"{r.contender} {r.median:.4g} ({r.ratio:.2f})" for r in rows if r.unit == "ms")
        self.console.print(f"{what} in {time.monotonic() - start:.0f} s: {best}", markup=False, highlight=False)


def run(
    parts: list[Part] = ["step", "layer", "pool"],  # noqa: B006 - shown in --help, never changed
    batches: list[int] = [256, 32],  # noqa: B006
    formats: list[Literal["contiguous", "channels_last"]] = ["channels_last"],  # noqa: B006
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16",
    graphs: bool = False,
    device: Literal["cuda", "cpu"] = "cuda",
    seconds: float = 500.0,
    rounds: int = 15,
    warmup: int = 3,
    quick: bool = False,
    output: Path = measure.RESULTS,
) -> None:
    """Time layers, max pools and a training step on a GPU against the memory's bandwidth, and stock layers.

    Args:
        parts: what to time.
        batches: images.
        formats: memory formats of the layers and pools.
        dtype: of their activations; parameters are float32.
        graphs: replay them as CUDA graphs, so that the host's part is left out.
        device: cpu is a dry run of the code: its figures mean nothing.
        seconds: no further measurement is begun after these.
        rounds: timings of each contender that count.
        warmup: rounds before these.
        quick: a smoke run on small shapes.
        output: folder for the CSV and the figure.

    Raises:
        ValueError: there is no GPU that CUDA and NCCL can use; or something could not be measured, which is named.
    """
    if device == "cuda" and not (torch.cuda.is_available() and dist.is_nccl_available()):
        raise ValueError("--section gpu needs an NVIDIA GPU, CUDA and NCCL, and found none: run it where they are")
    console = report.console()
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    words = ["gpu", name.replace(" ", "-"), dtype, *(["graphs"] if graphs else [])]
    path = output / f"{measure.environment(torch.get_num_threads())['date']}-{'-'.join(words)}.csv"
    session = Session(path, seconds, console)
    rounds, warmup = (2, 0) if quick else (rounds, warmup)
    # Backwards are timed again and again, so that what a compiled one reads must be left to it.
    convolutions_tried_out = torch.backends.cudnn.flags(enabled=True, benchmark=True)
    with group_of_one(device), functorch_config.patch(donated_buffer=False), convolutions_tried_out:
        bandwidth = copy_bandwidth(rounds, device)
        console.print(f"{name}: a copy moves {bandwidth / 1e12:.2f} TB/s")
        options = TimingOptions(device, DTYPES[dtype], graphs, rounds, warmup, bandwidth)
        steps = [StepSetting(n, 224, 1.0, device) for n in batches]
        shapes = [(N, C, side, side) for N in batches for C, side in layer_shapes()]
        max_pools = [pool for N in batches for pool in pools(N)]
        if quick:
            steps, shapes, max_pools = [StepSetting(2, 32, 0.125, device)], QUICK_SHAPES, QUICK_POOLS
        if "step" in parts:
            measure_steps(session, steps, rounds, warmup)
        if "pool" in parts:
            measure_pools(session, max_pools, formats, options)
        if "layer" in parts:
            measure_layers(session, sorted(shapes, key=math.prod, reverse=True), formats, options)
        if "step" in parts and device == "cuda":
            for setting in reversed(steps):
                compiled = partial(measure_step, setting, [OURS, COMPILED], rounds, warmup)
                session.measure(f"{setting}, compiled", compiled, COMPILING_A_NETWORK)
    if session.rows:
        title = report.titled(
            f"Inception-BN's layers with ReLU, its max pools and its step, {dtype}, {name}, "
            f"a copy moves {bandwidth / 1e12:.2f} TB/s",
            quick,
        )
        report.publish_results(session.rows, output, "-".join(words), title, torch.get_num_threads(), console)
        show_targets(session.rows, console)
    if session.left_out:
        console.print(f"left out after {seconds:.0f} s: {'; '.join(session.left_out)}", markup=False)
    if session.failed:
        raise ValueError(f"not measured: {'; '.join(session.failed)}")


def measure_steps(session: Session, settings: list[StepSetting], rounds: int, warmup: int) -> None:
    """Verify once, then time the step and its memory at each setting."""
    device = settings[0].device
    names = [OURS, GRAPH, KEPT, GROUP_OF_ONE, *([STOCK_SYNC] if device == "cuda" else []), CADENE]
    before = len(session.failed)
    session.measure("verification of the step", partial(_verified, settings[0]))
    if len(session.failed) > before:
        return
    for setting in settings:
        session.measure(str(setting), partial(measure_step, setting, names, rounds, warmup))
        eager = [name for name in names if name != GRAPH]
        session.measure(f"{setting}, memory", partial(measure_memory, setting, eager))


def _verified(setting: StepSetting) -> list[Measurement]:
    verify(setting)
    return []


def measure_pools(session: Session, max_pools: Sequence[Pool], formats: Sequence[str], options: TimingOptions) -> None:
    """Each pool in each memory format."""
    for pool in max_pools:
        for memory_format in formats:
            session.measure(f"max pool, {pool}, {memory_format}", partial(measure_pool, pool, memory_format, options))


def measure_layers(
    session: Session, shapes: list[tuple[int, int, int, int]], formats: Sequence[str], options: TimingOptions
) -> None:
    """All shapes, largest first; then, while time is left, the compiled stock layer at each."""
    for compiled in (False, True) if options.device == "cuda" else (False,):
        for shape in shapes:
            for memory_format in formats:
                what = f"{'x'.join(map(str, shape))}, {memory_format}{', compiled' if compiled else ''}"
                measurement = partial(measure_shape, shape, memory_format, options, compiled)
                session.measure(what, measurement, COMPILING_A_LAYER if compiled else 0.0)


@contextmanager
def group_of_one(device: str) -> Iterator[None]:
    """A process group over NCCL, on a CPU over gloo, that holds this process alone."""
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(str(Path(folder) / "store"), 1)
        dist.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=0, world_size=1)
        try:
            yield
        finally:
            dist.destroy_process_group()
