"""``syncbn predict WEIGHTS IMAGES...``: what is on photos, by any file of weights that can be imported."""

import csv
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TextIO

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from syncbn.data.batches import BatchedImages, ImageBatch, keep_batch
from syncbn.data.datamodule import use_one_thread
from syncbn.data.samplers import SampleKey
from syncbn.inference.images import find_images, prepare_images
from syncbn.models.weights import ModelCard, build_network, read_weights
from syncbn.nn import fold_batch_norm

Format = Literal["table", "csv", "jsonl"]


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of one image.

    Attributes:
        image: Its path.
        labels: Of the classes, the most probable first.
        probabilities: Of these classes.
    """

    image: Path
    labels: tuple[int, ...]
    probabilities: tuple[float, ...]


def predict(
    weights: Path,
    images: list[str],
    top_k: int = 5,
    format: Format = "table",
    output: Path | None = None,
    batch_size: int = 32,
    crops: int = 1,
    num_workers: int = 0,
    device: str = "auto",
) -> int:
    """Say what is on images: the most probable classes and their probabilities.

    The weights bring their network, the names of the classes and what images they want. Images that cannot be read are
    named and left out; the exit status is then 2. The test set of a config, on any number of ranks and with several
    networks, is predicted by `syncbn predict --config CONFIG --ckpt_path CKPT`.

    Args:
        weights: A checkpoint of `syncbn fit`, what `syncbn import` wrote, or whatever that reads.
        images: Files, folders or quoted patterns ('photos/**/*.jpg').
        top_k: How many classes of each image.
        format: "table" to read; "csv", a line for each image and class; "jsonl", a line of JSON for each image.
        output: File to write instead of the screen.
        batch_size: Images at a time; fewer with several crops.
        crops: Parts of an image over which the probabilities are averaged: 1, its centre; 10; or 144, GoogLeNet's.
        num_workers: Processes that decode the images. 0 decodes them in this one.
        device: "cpu", "cuda", "cuda:1" ...; "auto" takes a GPU where there is one.

    Returns:
        Exit status: 0, or 2 where an image was left out.

    Raises:
        ValueError: The weights cannot be read, there are no such images, or an argument is out of range.
    """
    for name, value in (("top_k", top_k), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")
    paths = find_images(images)
    content = read_weights(weights)
    where = choose_device(device)
    network = fold_batch_norm(build_network(content)).to(where)
    prepared = prepare_images(paths, content.card, crops)
    left_out = 0
    with opened(output) as stream, make_writer(format, stream, content.card) as writer:
        for batch in load_batches(prepared, max(1, batch_size // crops), num_workers):
            for prediction in predict_batch(network, batch, paths, top_k, where):
                writer.write(prediction)
            for message in batch.left_out:
                left_out += 1
                print(f"syncbn: left out: {message}", file=sys.stderr)
    if left_out:
        print(f"syncbn: {left_out} of {len(paths)} images were left out", file=sys.stderr)
    return 2 if left_out else 0


def choose_device(name: str) -> torch.device:
    """The device that a word names.

    Raises:
        ValueError: There is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} is not there: {str(error).splitlines()[0]}") from error
    return torch.device(name)


def load_batches(images: BatchedImages, batch_size: int, num_workers: int) -> Iterator[ImageBatch]:
    """All images in order."""
    keys = [SampleKey(0, index) for index in range(len(images))]
    sampler = BatchSampler(SequentialSampler(keys), batch_size, drop_last=False)
    batches = [[keys[place] for place in batch] for batch in sampler]
    yield from DataLoader(
        images,
        batch_sampler=batches,
        collate_fn=keep_batch,  # type: ignore[arg-type]  # batches come whole
        num_workers=num_workers,
        worker_init_fn=use_one_thread,
    )


@torch.inference_mode()
def predict_batch(
    network: nn.Module, batch: ImageBatch, paths: Sequence[Path], top_k: int, device: torch.device
) -> list[Prediction]:
    """The predictions of a batch; the probabilities of an image's crops are averaged."""
    if not len(batch.images):
        return []
    images = batch.images.to(device)
    probabilities: Tensor = network(images.flatten(0, -4)).softmax(1)
    if images.ndim == 5:
        probabilities = probabilities.unflatten(0, images.shape[:2]).mean(1)
    values, labels = probabilities.topk(min(top_k, probabilities.shape[1]))
    return [
        Prediction(paths[index], tuple(row_of_labels), tuple(row_of_values))
        for index, row_of_labels, row_of_values in zip(
            batch.indices.tolist(), labels.tolist(), values.tolist(), strict=True
        )
    ]


# ---- what is written -----------------------------------------------------------------------------


class Writer(ABC):
    """Writes predictions as they come.

    Args:
        stream: Where to.
        card: With the names of the classes.
    """

    def __init__(self, stream: TextIO, card: ModelCard) -> None:
        self.stream = stream
        self.classes = card.classes

    def name(self, label: int) -> str:
        """Of a class."""
        return f"class {label}" if self.classes is None else self.classes[label]

    @abstractmethod
    def write(self, prediction: Prediction) -> None:
        """Write one image's."""

    def finish(self) -> None:
        """Write what is left to write."""
        self.stream.flush()


class TableWriter(Writer):
    """A table to read, once all are there."""

    def __init__(self, stream: TextIO, card: ModelCard) -> None:
        super().__init__(stream, card)
        self.table = Table("image", "class")
        self.table.add_column("probability", justify="right")

    def write(self, prediction: Prediction) -> None:
        """Add a row for each class."""
        image = str(prediction.image)
        for label, probability in zip(prediction.labels, prediction.probabilities, strict=True):
            self.table.add_row(image, self.name(label), f"{100 * probability:.2f} %")
            image = ""
        self.table.add_section()

    def finish(self) -> None:
        """Print the table, on a screen as wide as it is, in a file as wide as needed."""
        console = Console(file=self.stream, markup=False, highlight=False)
        if not console.is_terminal:
            console.width = 100_000
            console.width = console.measure(self.table).maximum
        console.print(self.table)


class CsvWriter(Writer):
    """A line for each image and class: image, rank from 1, label, class, probability."""

    def __init__(self, stream: TextIO, card: ModelCard) -> None:
        super().__init__(stream, card)
        self.lines = csv.writer(stream)
        self.lines.writerow(["image", "rank", "label", "class", "probability"])

    def write(self, prediction: Prediction) -> None:
        """Write the image's lines."""
        for rank, (label, probability) in enumerate(
            zip(prediction.labels, prediction.probabilities, strict=True), start=1
        ):
            self.lines.writerow([prediction.image, rank, label, self.name(label), f"{probability:.6g}"])


class JsonLinesWriter(Writer):
    """A line of JSON for each image."""

    def write(self, prediction: Prediction) -> None:
        """Write the image's line."""
        classes = [
            {"label": label, "class": self.name(label), "probability": probability}
            for label, probability in zip(prediction.labels, prediction.probabilities, strict=True)
        ]
        print(
            json.dumps({"image": str(prediction.image), "predictions": classes}, ensure_ascii=False), file=self.stream
        )


WRITERS: dict[str, type[Writer]] = {"table": TableWriter, "csv": CsvWriter, "jsonl": JsonLinesWriter}


@contextmanager
def opened(output: Path | None) -> Iterator[TextIO]:
    """The file to write, or the screen."""
    if output is None:
        yield sys.stdout
        return
    with output.open("w", newline="") as stream:
        yield stream


@contextmanager
def make_writer(format: Format, stream: TextIO, card: ModelCard) -> Iterator[Writer]:
    """A writer that finishes what it wrote."""
    writer = WRITERS[format](stream, card)
    yield writer
    writer.finish()


def run(arguments: Sequence[str]) -> int:
    """Parse the words after ``syncbn predict`` and do what they say.

    Returns:
        The exit status.
    """
    assert predict.__doc__
    parser = ArgumentParser(
        prog="syncbn predict", exit_on_error=False, description=predict.__doc__.partition("Args:")[0]
    )
    parser.add_argument("weights", type=Path, help="A checkpoint, or any file that `syncbn import` reads.")
    # As a list that a shell may have expanded, which jsonargparse does not make of a function's parameter.
    parser.add_argument("images", type=str, nargs="+", help="Files, folders or quoted patterns ('photos/**/*.jpg').")
    parser.add_function_arguments(predict, skip={"weights", "images"})
    return predict(**parser.parse_args(list(arguments)).as_dict())
