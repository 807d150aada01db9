"""How `syncbn predict` writes what a network says about images: classes, or embeddings."""

import csv
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from syncbn.models.weights import ModelCard
from syncbn.paths import open_text

PredictionFormat = Literal["table", "csv", "jsonl", "npz"]


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


@dataclass(frozen=True)
class Embedding:
    """Where an image lies among others.

    Attributes:
        image: Its path.
        numbers: Of L2 norm 1, float32, shape (dimension,).
    """

    image: Path
    numbers: np.ndarray


class Writer(ABC):
    """Writes what is said of images as it comes.

    Args:
        stream: Where to; of text, or of bytes for a format that is binary.
        card: Of the network.
    """

    is_binary: ClassVar[bool] = False

    def __init__(self, stream: Any, card: ModelCard) -> None:
        self.stream = stream
        self.classes = card.classes

    def name(self, label: int) -> str:
        """Of a class."""
        return f"class {label}" if self.classes is None else self.classes[label]

    @abstractmethod
    def write(self, item: Any) -> None:
        """Write what is said of one image."""

    def finish(self) -> None:
        """Write what is left to write."""
        self.stream.flush()


# ---- classes -------------------------------------------------------------------------------------


class TableWriter(Writer):
    """A table to read, once all are there."""

    def __init__(self, stream: Any, card: ModelCard) -> None:
        super().__init__(stream, card)
        self.table = Table("image", "class")
        self.table.add_column("probability", justify="right")

    def write(self, item: Prediction) -> None:
        """Add a row for each class."""
        image = str(item.image)
        for label, probability in zip(item.labels, item.probabilities, strict=True):
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

    def __init__(self, stream: Any, card: ModelCard) -> None:
        super().__init__(stream, card)
        self.lines = csv.writer(stream)
        self.lines.writerow(["image", "rank", "label", "class", "probability"])

    def write(self, item: Prediction) -> None:
        """Write the image's lines."""
        for rank, (label, probability) in enumerate(zip(item.labels, item.probabilities, strict=True), start=1):
            self.lines.writerow([item.image, rank, label, self.name(label), f"{probability:.6g}"])


class JsonLinesWriter(Writer):
    """A line of JSON for each image."""

    def write(self, item: Prediction) -> None:
        """Write the image's line."""
        classes = [
            {"label": label, "class": self.name(label), "probability": probability}
            for label, probability in zip(item.labels, item.probabilities, strict=True)
        ]
        print(json.dumps({"image": str(item.image), "predictions": classes}, ensure_ascii=False), file=self.stream)


# ---- embeddings ----------------------------------------------------------------------------------


class EmbeddingCsvWriter(Writer):
    """A line for each image: its path, then the numbers."""

    def __init__(self, stream: Any, card: ModelCard) -> None:
        super().__init__(stream, card)
        self.lines = csv.writer(stream)
        self.lines.writerow(["image", *range(card.embedding_dimension or 0)])

    def write(self, item: Embedding) -> None:
        """Write the image's line; nine digits give the same float32 again."""
        self.lines.writerow([item.image, *(f"{number:.9g}" for number in item.numbers)])


class EmbeddingJsonLinesWriter(Writer):
    """A line of JSON for each image."""

    def write(self, item: Embedding) -> None:
        """Write the image's line."""
        line = {"image": str(item.image), "embedding": item.numbers.tolist()}
        print(json.dumps(line, ensure_ascii=False), file=self.stream)


class EmbeddingNpzWriter(Writer):
    """NumPy's archive, once all are there: ``images``, their paths, and ``embeddings``, float32 (N, dimension)."""

    is_binary = True

    def __init__(self, stream: Any, card: ModelCard) -> None:
        super().__init__(stream, card)
        self.dimension = card.embedding_dimension
        self.items: list[Embedding] = []

    def write(self, item: Embedding) -> None:
        """Keep the image's row."""
        self.items.append(item)

    def finish(self) -> None:
        """Write the arrays."""
        images = np.array([str(item.image) for item in self.items], dtype=np.str_)
        rows = [item.numbers for item in self.items]
        embeddings = np.stack(rows) if rows else np.zeros((0, self.dimension or 0), np.float32)
        np.savez(self.stream, images=images, embeddings=embeddings)
        self.stream.flush()


OF_CLASSES: dict[str, type[Writer]] = {"table": TableWriter, "csv": CsvWriter, "jsonl": JsonLinesWriter}
OF_EMBEDDINGS: dict[str, type[Writer]] = {
    **{"csv": EmbeddingCsvWriter, "jsonl": EmbeddingJsonLinesWriter},
    **{"npz": EmbeddingNpzWriter},
}
"""By the name of the format; the first is taken where none is asked for."""


def choose_writer(format: PredictionFormat | None, output: Path | None, card: ModelCard) -> type[Writer]:
    """The writer of a format.

    Raises:
        ValueError: What the network gives cannot be written so.
    """
    kinds, what = (OF_CLASSES, "classes") if card.embedding_dimension is None else (OF_EMBEDDINGS, "embeddings")
    name: str = format or next(iter(kinds))
    if name not in kinds:
        raise ValueError(f"--format {name} cannot hold {what}, which these weights give: take {' or '.join(kinds)}")
    if kinds[name].is_binary and output is None:
        raise ValueError(f"--format {name} is not for the screen: name a file with --output")
    return kinds[name]


@contextmanager
def opened_writer(kind: type[Writer], output: Path | None, card: ModelCard) -> Iterator[Writer]:
    """A writer to a file, or to the screen, that finishes what it wrote."""
    if output is None:
        writer = kind(sys.stdout, card)
        yield writer
        writer.finish()
        return
    with output.open("wb") if kind.is_binary else open_text(output) as stream:
        writer = kind(stream, card)
        yield writer
        writer.finish()
