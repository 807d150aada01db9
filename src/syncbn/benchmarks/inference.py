"""Inference with each BatchNorm folded into its convolution, and without: latency and throughput, in float32.

    syncbn benchmark --section inference
    syncbn benchmark --section inference --inference.weights model.safetensors --inference.batch [1,32]

Timed is the processor's time of one thread, which neighbours on the machine change less than the clock on the wall.

Contenders are the same network on the same images; each is compared with it in float64 before it is timed:
- "syncbn": folded by `syncbn.fold_batch_norm`, as `syncbn predict` runs it;
- "not folded": the network as it was trained;
- "not folded, nn.BatchNorm2d": the same after `syncbn.revert_sync_batchnorm`;
- "folded, TorchScript" and "folded, onnxruntime": as `syncbn export` writes it; the second where it is installed.
"""

import copy
import tempfile
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from syncbn.benchmarks.harness import measure, report
from syncbn.benchmarks.harness.measure import FORMATS, OURS, Measurement
from syncbn.inference.graphs import GRAPHS
from syncbn.models import InceptionBN, inception_bn
from syncbn.models.weights import load_network
from syncbn.nn import fold_batch_norm, revert_sync_batchnorm

KEEP_MEMORY = True
TOLERANCE = 1e-4  # of the largest logit


def network_of_noise(width: float) -> InceptionBN:
    """A network whose running statistics are those of noise."""
    torch.manual_seed(0)
    network = inception_bn(1000, width_multiplier=width)
    for layer in network.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.momentum = 1.0
    with torch.no_grad():
        network(torch.randn(8, 3, 96, 96))
    return network.eval()


def make_contenders(network: InceptionBN, images: Tensor, folder: Path) -> dict[str, Callable[[], Tensor]]:
    """What is timed, by name; the graphs run on contiguous images."""
    folded = fold_batch_norm(network)
    reverted = revert_sync_batchnorm(copy.deepcopy(network))
    contenders = {
        OURS: lambda: folded(images),
        "not folded": lambda: network(images),
        "not folded, nn.BatchNorm2d": lambda: reverted(images),
    }
    if images.is_contiguous():
        for name, format in (("folded, TorchScript", "torchscript"), ("folded, onnxruntime", "onnx")):
            if format == "onnx" and not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))):
                continue
            path = folder / format
            if not path.exists():
                GRAPHS[format].write(folded, images[:1].expand(2, -1, -1, -1).contiguous(), path, "logits", {})
            contenders[name] = partial(GRAPHS[format].load(path), images)
    return contenders


def measure_network(network: InceptionBN, pixels: int, batch: int, rounds: int, folder: Path) -> list[Measurement]:
    """Latency (a batch of 1) or time of a batch, in both memory formats."""
    rows = []
    images = torch.randn(batch, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = copy.deepcopy(network).double()(images.double())
        for name, memory_format in FORMATS.items():
            given = images.to(memory_format=memory_format)
            laid_out = copy.deepcopy(network).to(memory_format=memory_format)  # type: ignore[call-overload]
            contenders = make_contenders(laid_out, given, folder)
            for contender, run in contenders.items():
                measure.verify(contender, {"logits": measure.relative_error(run(), expected)}, TOLERANCE)
            times = measure.time_in_turns(contenders, rounds, timer=measure.cpu_time)
            rows += measure.rows_of("inference", f"{batch} x {pixels} px", name, 1, times)
    return rows


def run(
    weights: Path | None = None,
    pixels: list[int] | None = None,
    batch: list[int] | None = None,
    width: float = 1.0,
    rounds: int = 15,
    quick: bool = False,
    output: Path = measure.RESULTS,
) -> None:
    """Time inference folded and not.

    Args:
        weights: file of weights; without it a network of noise, whose times are the same.
        pixels: sides of the images.
        batch: images at a time.
        width: factor on the channels of the network of noise.
        rounds: timings of each contender that count.
        quick: a smoke run, tiny.
        output: folder for the CSV and the figure.
    """
    torch.set_num_threads(1)
    if quick:
        pixels, batch, width, rounds = [32], [2], 0.125, 2
    network = network_of_noise(width) if weights is None else load_network(weights)
    console = report.console()
    rows: list[Measurement] = []
    with report.progress(console) as progress, tempfile.TemporaryDirectory() as name:
        task = progress.add_task("", total=None)
        for side in pixels or [224]:
            folder = Path(name) / str(side)
            folder.mkdir()
            for count in batch or [1, 16]:
                progress.update(task, description=f"{count} x {side} px")
                rows += measure_network(network, side, count, rounds, folder)
    title = report.titled("Inference: CPU time of a batch, folded (syncbn) and not", quick)
    report.publish_results(rows, output, "inference", title, 1, console)
    for row in rows:
        images = int(row.shape.partition(" ")[0])
        console.print(f"{row.contender}, {row.shape}, {row.memory_format}: {1000 * images / row.median:.1f} images/s")
