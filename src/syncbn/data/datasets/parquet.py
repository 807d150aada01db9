"""Images in Hugging Face's tables: parquet files with a column of encoded images and one of labels.

Source of the layout: the ``datasets`` package, whose ``push_to_hub`` writes ``train-00000-of-00294.parquet``, an image
as a struct of its bytes and its path, and the names of the classes into the schema's metadata. Its ``to_parquet``
leaves out the bytes: the file at the path is then read, where it is there.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from syncbn.data.datasets.base import EncodedDataset, ReadError, Reading, ShardLayout, Splits
from syncbn.data.datasets.splits import not_used, split_of, visible_folders

SHARD_BYTES = 100_000_000
"""Consecutive row groups of a file are shuffled as one shard of at least this size, which ``syncbn prepare`` uses."""
ROW_GROUPS_KEPT = 2
"""In memory, by each process: images are read in order, so more would not be used again."""


def find_parquet_files(folder: Path, split: str) -> list[Path]:
    """The files of one split ("train", "val" or "test"), sorted.

    They lie in the folder or in its folder ``data``, and their names begin with a name of the split, as
    "train-00000-of-00294.parquet"; or they lie in a folder with such a name.
    """
    for place in (folder, folder / "data"):
        files = [path for path in place.glob("*.parquet") if _split_of_file(path) == split]
        if files:
            return sorted(files)
    folders = [entry for entry in visible_folders(folder) if split_of(entry.name) == split]
    return sorted(path for entry in folders for path in entry.glob("*.parquet"))


def _split_of_file(path: Path) -> str | None:
    return split_of(re.split(r"[-.]", path.name)[0])


def unused_parquet_files(folder: Path) -> list[Path]:
    """The tables beside those of the splits, sorted."""
    used = {path for split in ("train", "val", "test") for path in find_parquet_files(folder, split)}
    return sorted({*folder.glob("*.parquet"), *folder.glob("data/*.parquet")} - used)


def import_pyarrow() -> Any:
    """The package ``pyarrow.parquet``.

    Raises:
        ValueError: It is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError("reading parquet files needs pyarrow: pip install 'syncbn[huggingface]'") from error
    return pyarrow.parquet


def arrow_errors() -> tuple[type[Exception], ...]:
    """What reading a missing or broken table raises."""
    import pyarrow

    return OSError, pyarrow.ArrowException


def one_line(error: Exception) -> str:
    """The message of an error without line breaks, which those of Arrow have."""
    return " ".join(str(error).split())


def is_unlabelled(files: Sequence[Path]) -> bool:
    """Whether a split has no labels, as test sets whose labels are kept secret: each is -1 or missing."""
    with import_pyarrow().ParquetFile(files[0]) as table:
        _, label, _ = image_and_label_columns(table.schema_arrow, files[0])
        values = table.read(columns=[label], use_threads=False)[label].to_pylist()
    return all(value in (None, -1) for value in values)


class ParquetDataset(EncodedDataset):
    """The images of parquet files, decoded on demand; one file is open at a time.

    A table can only be read a row group at a time. So each process reads whole row groups to use its share of them:
    for many ranks and workers rather convert the data to shards.

    Args:
        files: Of one split, in order. Where a file names its classes, its numbers are those of these names.
        classes: Names of the classes in the order of their labels; None takes those that the first file names.

    Raises:
        ValueError: pyarrow is missing; a file is broken, lacks the columns, or holds a label of no class or paths where
            no images are.
    """

    def __init__(self, files: Sequence[Path], classes: Sequence[str] | None = None) -> None:
        parquet = import_pyarrow()
        self.files = list(files)
        groups: list[tuple[int, int, int, int]] = []  # file, row group within it, rows, bytes
        values: list[Any] = []
        self._image = ""
        for number, path in enumerate(self.files):
            try:
                with parquet.ParquetFile(path) as table:
                    image, label, named = image_and_label_columns(table.schema_arrow, path)
                    self._image = self._image or image
                    if image != self._image:
                        raise ValueError(f"{path} has its images in {image!r}, {self.files[0]} in {self._image!r}")
                    _require_images(table, image, path)
                    groups += [(number, *group) for group in _row_groups(table.metadata)]
                    of_file = table.read(columns=[label], use_threads=False)[label].to_pylist()
            except arrow_errors() as error:
                raise ValueError(f"cannot read the table {path}: {one_line(error)}") from error
            classes = named if classes is None else classes
            values += by_name(of_file, named, classes)
        super().__init__(*labels_of(values, classes, self.files[0].parent))
        self.numbers_classes = bool(values) and isinstance(values[0], int)
        self._groups = np.array(groups, dtype=np.int64).reshape(-1, 4)
        self._starts = np.append(0, np.cumsum(self._groups[:, 2]))
        self.layout = _bundle(self._groups)
        self._open: tuple[int, Any] = (-1, None)
        self._kept: OrderedDict[int, Any] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to this process: the open file and the rows kept."""
        return self.__dict__ | {"_open": (-1, None), "_kept": OrderedDict()}

    def encoded(self, index: int) -> bytes:
        """The file of the image at ``index``.

        Raises:
            ReadError: The table cannot be read, or holds neither bytes there nor the path of a file; the message names
                it and the row.
        """
        group, row = self._place(index)
        try:
            image = self._images(group)[row].as_py()
            if isinstance(image, dict):
                image = image.get("path") if image.get("bytes") is None else image["bytes"]
            if isinstance(image, str):
                image = place_of(image, self.files[self._groups[group, 0]]).read_bytes()
        except arrow_errors() as error:
            raise ReadError(f"cannot read the image {self.name(index)}: {one_line(error)}") from error
        if image is None:
            raise ReadError(f"cannot read the image {self.name(index)}: the table holds nothing there")
        return image

    def name(self, index: int) -> str:
        """File and row that hold the image at ``index``."""
        group, _ = self._place(index)
        file = self._groups[group, 0]
        first = self._starts[np.searchsorted(self._groups[:, 0], file)]
        return f"{self.files[file]} (row {index - first})"

    def _place(self, index: int) -> tuple[int, int]:
        """The row group that holds the image at ``index``, counted over all files, and its row in the group."""
        group = int(np.searchsorted(self._starts, index, side="right")) - 1
        return group, index - int(self._starts[group])

    def _images(self, group: int) -> Any:
        """The column of images of a row group."""
        if group not in self._kept:
            file, number = self._groups[group, :2].tolist()
            if self._open[0] != file:
                self._open = (-1, None)
                self._open = (file, import_pyarrow().ParquetFile(self.files[file]))
            table = self._open[1].read_row_group(number, columns=[self._image], use_threads=False)
            self._kept[group] = table[0].combine_chunks()
            while len(self._kept) > ROW_GROUPS_KEPT:
                self._kept.popitem(last=False)
        return self._kept[group]


def image_and_label_columns(schema: Any, path: Path) -> tuple[str, str, list[str] | None]:
    """The columns of images and labels, and the names of the classes where the schema's metadata tell them.

    Args:
        schema: Of Arrow.
        path: Of the table, for messages.

    Returns:
        The column of encoded images, that of labels, and the names or None.

    Raises:
        ValueError: There are no such columns.
    """
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = metadata.get("info", {}).get("features", {})
    kinds = {name: feature.get("_type") for name, feature in features.items() if isinstance(feature, dict)}
    of_classes = [name for name, kind in kinds.items() if kind == "ClassLabel"]
    images = [name for name, kind in kinds.items() if kind == "Image"] + ["image", "img"]
    labels = [name for name in ("label", "labels") if not of_classes or name in of_classes] + of_classes
    image, label = (next((name for name in names if name in schema.names), None) for names in (images, labels))
    if image is None or label is None:
        raise ValueError(
            f"{path} has the columns {', '.join(schema.names)}: a column 'image' and a column 'label' are needed"
        )
    return image, label, features.get(label, {}).get("names")


def place_of(path: str, table: Path) -> Path:
    """The file that a path in a table means, which may be relative to the table's folder."""
    return table.parent / Path(path).expanduser()


def _require_images(table: Any, image: str, path: Path) -> None:
    """Refuse a table that has paths in the place of images, if there is no file at the first one.

    Args:
        table: Opened.
        image: The column of images.
        path: Of the table.

    Raises:
        ValueError: The file is missing.
    """
    schema, metadata = table.schema_arrow, table.metadata
    names = [metadata.schema.column(number).path for number in range(metadata.num_columns)]
    if f"{image}.bytes" in names and f"{image}.path" in names:
        column, part = names.index(f"{image}.bytes"), f"{image}.path"
        found = [metadata.row_group(number).column(column).statistics for number in range(metadata.num_row_groups)]
        if not found or not all(statistics and statistics.has_null_count for statistics in found):
            return
        if sum(statistics.null_count for statistics in found) < metadata.num_rows:
            return
    elif str(schema.field(image).type) in ("string", "large_string"):
        part = image
    else:
        return
    first = table.read_row_group(0, columns=[part], use_threads=False)[0][0].as_py() if metadata.num_rows else None
    first = first["path"] if isinstance(first, dict) else first
    if first and not place_of(first, path).is_file():
        raise ValueError(
            f"the table {path} holds paths of images, not images, and there is no file {first}: bring them there, or"
            " embed them as you write it: dataset.with_format('arrow').map(datasets.table.embed_table_storage,"
            " batched=True).to_parquet(...)"
        )


def by_name(values: list[Any], named: Sequence[str] | None, classes: Sequence[str] | None) -> list[Any]:
    """The labels of a file, those that are numbers by the names that the file has for them.

    The same number may mean another class in another file, as each lists its names in an order of its own.

    Args:
        values: Numbers of classes, or their names.
        named: What the file calls its classes, in the order of their numbers; None where it does not say.
        classes: Names of the classes of the data set; None where no file says them.

    Returns:
        The values as they are where the data set's classes have no names but numbers.
    """
    if named is None or classes is None or list(named) == list(classes):
        return values
    if list(classes) == [str(number) for number in range(len(classes))]:
        return values
    return [named[value] if type(value) is int and 0 <= value < len(named) else value for value in values]


def labels_of(values: list[Any], classes: Sequence[str] | None, folder: Path) -> tuple[Sequence[str], np.ndarray]:
    """Classes, and labels by number: int64, shape (N,).

    Args:
        values: Numbers of classes, or their names.
        classes: Names of the classes; None takes the values themselves as names.
        folder: Of the tables, for messages.

    Raises:
        ValueError: A value is missing, is no whole number, or names no class.
    """
    if any(isinstance(value, float) for value in values):  # as pandas writes numbers some of which are missing
        values = [int(value) if isinstance(value, float) and value.is_integer() else value for value in values]
        broken = next((value for value in values if isinstance(value, float)), None)
        if broken is not None:
            raise ValueError(f"the tables in {folder} hold the label {broken}: a whole number or a name is needed")
    if classes is None:
        if any(value is None for value in values):
            raise ValueError(f"the tables in {folder} hold images without a label")
        whole = bool(values) and isinstance(values[0], int)
        classes = [str(value) for value in range(max(values) + 1)] if whole else sorted(set(values))
    known: dict[Any, int] = {name: label for label, name in enumerate(classes)}
    known |= {label: label for label in range(len(classes))}
    unknown = sorted({str(value) for value in values if value not in known})
    if unknown:
        raise ValueError(
            f"the tables in {folder} hold the label {unknown[0]}, which is none of the {len(classes)} classes"
        )
    return classes, np.array([known[value] for value in values], dtype=np.int64)


def _row_groups(metadata: Any) -> list[tuple[int, int, int]]:
    """Of each row group of a file its number, rows and bytes."""
    groups = [metadata.row_group(number) for number in range(metadata.num_row_groups)]
    sizes = [sum(group.column(i).total_compressed_size for i in range(group.num_columns)) for group in groups]
    return [(number, group.num_rows, size) for number, (group, size) in enumerate(zip(groups, sizes, strict=True))]


def _bundle(groups: np.ndarray) -> ShardLayout:
    """Consecutive row groups of a file, put together to shards of at least `SHARD_BYTES`; (G, 4) as in the class."""
    starts, sizes = [0], []
    samples = size = 0
    for number, (file, _, rows, length) in enumerate(groups.tolist()):
        samples, size = samples + rows, size + length
        is_last_of_file = number + 1 == len(groups) or groups[number + 1, 0] != file
        if size >= SHARD_BYTES or is_last_of_file:
            starts.append(samples)
            sizes.append(size)
            size = 0
    return ShardLayout(np.array(starts, dtype=np.int64), np.array(sizes, dtype=np.int64))


DESCRIPTION = "of Hugging Face's parquet files (train-*.parquet ...)"


def matches(folder: Path) -> bool:
    """Whether ``folder`` holds parquet files of training images."""
    return bool(find_parquet_files(folder, "train"))


def open_splits(folder: Path, reading: Reading) -> Splits:
    """Open the splits of a folder of parquet files.

    Raises:
        ValueError: A table holds no images or labels, or other classes than the training images.
    """
    train = ParquetDataset(find_parquet_files(folder, "train"))
    splits = {"train": train}
    unused = unused_parquet_files(folder)
    for split in ("val", "test"):
        files = find_parquet_files(folder, split)
        if split == "test" and files and is_unlabelled(files):
            unused += files
        elif files:
            splits[split] = ParquetDataset(files, None if reading.own_classes else train.classes)
    turns = reading.turns(train.classes)
    for dataset in splits.values():
        dataset.exif_orientation = turns
    return Splits({**splits}, turns, not_used(unused, folder))
