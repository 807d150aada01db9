"""``syncbn export``: a trained network for other programs, checked on images before it is called done."""

import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from syncbn.data.datasets.fashion_mnist import fashion_mnist
from syncbn.data.loading.samplers import SampleKey
from syncbn.files import publish
from syncbn.inference.graphs import GRAPHS, Graph, Onnx, PixelInput, Runner
from syncbn.inference.images import find_images, prepare_images
from syncbn.models.weights import (
    CARD_KEY,
    ModelCard,
    build_network,
    card_path,
    check_input,
    read_weights,
    require_folder,
    write_weights,
)
from syncbn.nn import fold_batch_norm, revert_sync_batchnorm
from syncbn.preprocessing import Preprocessing
from syncbn.progress import ProgressLines
from syncbn.run_folders import file_of_weights

ExportFormat = Literal["onnx", "torchscript", "exported", "safetensors", "cadene", "slim"]

SUFFIXES = {
    **{"onnx": ".onnx", "torchscript": ".torchscript.pt", "exported": ".pt2"},
    **{"safetensors": ".safetensors", "cadene": ".pth", "slim": ".npz"},
}

EMBEDDED_IMAGES = 16
"""Of those that come with the package, to compare on where there are no others."""

BATCH = 32
"""Images at a time."""

LARGEST_DIFFERENCE = 1e-4
"""Of outputs up to 10; where they are larger, `SHARE` of the largest, since float32 rounds them."""

SHARE = 1e-5
"""Of the largest output; folding was seen to change logits of up to 3930 by 0.0032."""

FOLDED_BY_DEFAULT = ("onnx", "torchscript", "exported", "safetensors")
"""What is for inference; the public layouts have BatchNorm."""

OF_BATCH_NORM = ("stem_norm", "conv_bias", "gamma", "eps", "momentum")
"""Arguments of `inception_bn` that have no meaning without it."""


def export(
    weights: Path,
    format: ExportFormat = "onnx",
    output: Path | None = None,
    fold: bool | None = None,
    preprocessing: bool = False,
    images: str | None = None,
    opset: int | None = None,
    ir_version: int | None = None,
) -> None:
    """Write a trained network for other programs: as a graph, with BatchNorm folded, or as weights of a public layout.

    Graphs take any number of images at a time: normalised float32 of shape (N, C, H, W), and return logits, or
    embeddings of a network that was trained to embed. What is written is read again and compared with the original on
    images; where an output differs by 1e-4 or more (where outputs exceed 10, by 1e-5 of the largest), nothing is left
    behind. A model card (FILE.card.json beside the file, also metadata of a safetensors or ONNX file) says how images
    are prepared, in fields and in words, and names the classes.

    Args:
        weights: A checkpoint of `syncbn fit`, or the folder of its run, whose best checkpoint is taken; what `syncbn
            import` wrote, or whatever that reads.
        format: Graphs: "onnx", "torchscript" or "exported" (torch.export). Weights: "safetensors" (ours; folded, it is
            an `inception_bn` with norm="none" and loads like any other), "cadene" (bninception, .pth) or "slim"
            (inception_v2, .npz).
        output: File to write. Without it the name of the weights with the suffix of the format, beside them.
        fold: Whether each BatchNorm becomes part of the convolution before it: true without it, but for the public
            layouts, which keep theirs. What is folded cannot be trained with BatchNorm any more; `syncbn import` makes
            a safetensors file that can.
        preprocessing: Whether a graph normalises by itself: it then takes RGB pixels, uint8 of 0..255.
        images: File, folder or pattern of the images to compare on, all of them. Without it, 16 that come with the
            package.
        opset: Version of ONNX's operators, 18 to 23. Without it 18, which onnxruntime runs since 1.15 of May 2023.
        ir_version: Version of ONNX's file format, 8 to 11. Without it the lowest that holds the opset.

    Raises:
        ValueError: The weights cannot be read, the format cannot express the network, the result differs, or a
            package that the format needs is missing.
        OSError: A file cannot be read or written.
    """
    if preprocessing and format not in GRAPHS:
        raise ValueError(
            f"--preprocessing true has no meaning with --format {format}, which holds weights: leave it out"
        )
    if fold and format not in FOLDED_BY_DEFAULT:
        raise ValueError(
            f"--fold true has no meaning with --format {format}, whose readers want BatchNorm: leave it out"
        )
    graph = choose_graph(format, opset, ir_version)
    weights = file_of_weights(weights)
    content = read_weights(weights)
    network = build_network(content)
    check_input(content.card, network)
    check_images = CheckImages(content.card, images)
    output = default_output(weights, format) if output is None else output
    if output.exists() and weights.exists() and output.samefile(weights):
        raise ValueError(f"{output} is the file of weights itself: name another with --output")
    require_folder(output)
    folds = format in FOLDED_BY_DEFAULT if fold is None else fold
    norms = len([layer for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)])
    folding = "folded into the convolutions before them" if folds else "kept"
    print(f"{norms} BatchNorm layers {folding}; writing {format} and comparing", flush=True)
    job = ExportJob(network, content.card, format, graph, folds, preprocessing)
    with_temporary(output, lambda temporary: job.write_and_check(temporary, check_images.batches()))
    check_images.report()
    if isinstance(graph, Onnx):
        print(graph.describe())
    print(output)


def choose_graph(format: ExportFormat, opset: int | None, ir_version: int | None) -> Graph | None:
    """How a format of graphs is written; None of weights.

    Raises:
        ValueError: There are no such versions, or the format has none.
    """
    versions = {"opset": opset, "ir_version": ir_version}
    given = {name: value for name, value in versions.items() if value is not None}
    if format == "onnx":
        return Onnx(**given)
    for name, value in given.items():
        raise ValueError(f"--{name} {value} has no meaning with --format {format}: leave it out")
    return GRAPHS.get(format)


@dataclass(frozen=True)
class ExportJob:
    """What is exported, and how.

    Attributes:
        network: The original.
        card: Of the network.
        format: One of `SUFFIXES`.
        graph: Writes it; None of weights.
        fold: Whether what is written is the folded network.
        preprocessing: Whether a graph takes pixels.
    """

    network: Any
    card: ModelCard
    format: ExportFormat
    graph: Graph | None
    fold: bool
    preprocessing: bool

    def write_and_check(self, path: Path, batches: Iterable[Tensor]) -> None:
        """Write the file, compare what it computes with the original, and print the comparison.

        Args:
            path: To write.
            batches: Pixels to compare on, RGB or grey, uint8, each of shape (N, C, H, W); a graph is traced on two
                images of the first, so that what works on the others does so with any number.

        Raises:
            ValueError: They differ.
        """
        normalise = PixelInput(nn.Identity(), self.card.preprocessing)
        run: Runner | None = None
        comparison = Comparison(self.card.embedding_dimension is None)
        for pixels in batches:
            given = pixels if self.preprocessing else normalise(pixels)
            if run is None:
                run = self._write(path, given[:1].expand(2, -1, -1, -1).contiguous())
            with torch.inference_mode():
                comparison.add(self.network(normalise(pixels)), run(given))
        print(comparison.words())
        comparison.check()

    def _write(self, path: Path, example: Tensor) -> Runner:
        """Write the file, and return what is read from it."""
        if self.graph is None:
            network, card = (self.network, self.card) if not self.fold else folded(self.network, self.card)
            write_weights(network, card, path, self.format)
            return build_network(read_weights(path))
        inference = fold_batch_norm(self.network) if self.fold else revert_sync_batchnorm(self.network)
        inference = PixelInput(inference, self.card.preprocessing) if self.preprocessing else inference
        card = self._card_of_graph()
        notes = {CARD_KEY: card.to_json(), "pixels": card.in_words}
        self.graph.write(inference.eval(), example, path, self.output_name, notes)
        card_path(path).write_text(card.to_json())
        return self.graph.load(path)

    @property
    def output_name(self) -> str:
        """What a graph gives."""
        return "logits" if self.card.embedding_dimension is None else "embeddings"

    def _card_of_graph(self) -> ModelCard:
        """The card, by which pixels stay as they are where the graph normalises."""
        if not self.preprocessing:
            return self.card
        channels = self.network.in_channels
        return replace(self.card, preprocessing=Preprocessing("RGB", (0.0,) * channels, (1.0,) * channels))


def folded(network: Any, card: ModelCard) -> tuple[Any, ModelCard]:
    """The folded network and its card: an Inception without normalisation, whose convolutions have biases.

    Raises:
        ValueError: A layer cannot be folded.
    """
    if "per_activation_head" in card.architecture:
        raise ValueError(
            "per_activation_head: its BatchNorm differs from position to position, which no convolution can express:"
            " give --fold false"
        )
    kept = {name: value for name, value in card.architecture.items() if name not in OF_BATCH_NORM}
    return fold_batch_norm(network), replace(card, architecture=kept | {"norm": "none"})


@dataclass
class Comparison:
    """How far two networks agree, over all images so far.

    Attributes:
        classifies: Whether the outputs are logits, of which the largest counts; else embeddings.
        images: How many there were.
        difference: The largest of an output.
        size: The largest output, without its sign.
        agreeing: Images whose most probable class is the same.
        ties: The others. Outputs that differ by d can only exchange two classes whose logits in the original are at
            most 2 d apart, so these are near-ties of the original, and the largest difference is what decides.
        widest_tie: The largest distance of two logits that were exchanged.
    """

    classifies: bool = True
    images: int = 0
    difference: float = 0.0
    size: float = 0.0
    agreeing: int = 0
    ties: int = 0
    widest_tie: float = 0.0

    def add(self, expected: Tensor, actual: Tensor) -> None:
        """Compare outputs (N, classes or numbers) of both."""
        difference = (expected - actual).abs().max().nan_to_num(math.inf).item()
        self.images += len(expected)
        self.difference = max(self.difference, difference)
        self.size = max(self.size, expected.abs().max().item())
        best = expected.amax(1)
        margins = best - expected.gather(1, actual.argmax(1, keepdim=True)).squeeze(1)
        agrees = expected.argmax(1) == actual.argmax(1)
        self.agreeing += int(agrees.sum())
        self.ties += int((~agrees).sum())
        self.widest_tie = max(self.widest_tie, margins.max().item())

    def words(self) -> str:
        """The comparison in words."""
        what = "logits" if self.classifies else "numbers"
        words = f"compared on {self.images:,} images: largest difference {self.difference:.2g} of {what} up to"
        if not self.classifies:
            return f"{words} {self.size:.3g}"
        words = f"{words} {self.size:.3g}, {self.agreeing:,} of {self.images:,} top-1 classes agree"
        if self.ties:
            words += (
                f", {self.ties:,} near-ties of the original do not (its two logits at most {self.widest_tie:.2g} apart)"
            )
        return words

    def check(self) -> None:
        """Refuse networks that differ by more than rounding.

        Raises:
            ValueError: They do.
        """
        allowed = max(LARGEST_DIFFERENCE, SHARE * self.size)
        if not self.difference < allowed:
            raise ValueError(
                f"what was written does not compute what the original does (an output differs by {self.difference:.2g},"
                f" allowed is less than {allowed:.2g}): it was removed again"
            )


class CheckImages:
    """Images to compare on, cut and resized as the network wants them.

    Args:
        card: Of the network.
        images: File, folder or pattern; None takes some that come with the package.

    Raises:
        ValueError: There are no such images, or the card does not say what the network is fed.
    """

    def __init__(self, card: ModelCard, images: str | None) -> None:
        self.source = images
        self.paths = [] if images is None else find_images([images])
        self.prepared = prepare_images(self.paths, card)
        self.left_out: list[str] = []

    def batches(self) -> Iterator[Tensor]:
        """The images: uint8, shape (N, C, H, W).

        Raises:
            ValueError: None of them can be read.
        """
        empty = True
        for pixels in self._embedded() if self.source is None else self._named():
            if len(pixels):
                empty = False
                yield torch.from_numpy(pixels).movedim(-1, 1).contiguous()
        if empty:
            raise ValueError(f"--images {self.source}: no image there can be read, such as: {self.left_out[0]}")

    def report(self) -> None:
        """Name the images that could not be read."""
        for message in self.left_out:
            print(f"syncbn: left out of the comparison: {message}", file=sys.stderr)

    def _embedded(self) -> Iterator[np.ndarray]:
        some = fashion_mnist("test").images[:EMBEDDED_IMAGES, :, :, None]
        channels = self.prepared.dataset.channels
        cut = np.concatenate([self.prepared.crops(np.repeat(image, channels, 2)) for image in some])
        yield from (cut[:1], cut[1:])

    def _named(self) -> Iterator[np.ndarray]:
        keys = [SampleKey(0, index) for index in range(len(self.paths))]
        with ProgressLines() as lines:
            task = lines.add_task("comparing on images", total=len(keys))
            for start in range(0, len(keys), BATCH):
                pixels, _, left_out = self.prepared.pixels(keys[start : start + BATCH])
                self.left_out += left_out
                yield pixels[:, 0]
                lines.advance(task, BATCH)


def default_output(weights: Path, format: ExportFormat) -> Path:
    """Beside the weights, with the suffix of the format."""
    return weights.with_suffix(SUFFIXES[format])


def with_temporary(output: Path, write: Callable[[Path], None]) -> None:
    """Have a file written beside its place, card included, and put both there only if nothing is raised."""
    temporary = output.with_name(f".{os.getpid()}.{output.name}")
    try:
        write(temporary)
        publish(temporary, output)
        if card_path(temporary).exists():
            publish(card_path(temporary), card_path(output))
    finally:
        temporary.unlink(missing_ok=True)
        card_path(temporary).unlink(missing_ok=True)


COMMANDS = export
