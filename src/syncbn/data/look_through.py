"""Looks the photos of class folders through before a training: which of them cannot be read.

Threads read the beginning and the end of each file. What is unusual there is decoded as in training, which decides, so
that no readable image is left out. An image that is damaged between its beginning and its end is met later.
"""

import json
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from lightning.pytorch import Trainer
from PIL import Image

from syncbn.data.datasets.base import ImageDataset, ReadError
from syncbn.data.datasets.decoding import OF_PILLOW, kind_of
from syncbn.data.datasets.formats import ImageSets
from syncbn.data.datasets.image_folder import ImageFolderDataset
from syncbn.data.datasets.jpeg import END_OF_IMAGE, find_frame, is_cut_short
from syncbn.data.datasets.selection import Selection, class_counts, origin_of
from syncbn.data.datasets.splits import a_few_of
from syncbn.data.transforms.photo import Photo
from syncbn.files import atomic_file
from syncbn.progress import SECONDS_BETWEEN_LINES

RECORD = "unreadable.json"
"""In a run folder: what was found at the start of the run, as JSON."""

MOST_IMAGES = 100_000
"""Images that are looked at; of more, this many evenly spaced ones."""

MOST_SECONDS = 600.0
"""After which no more are looked at: other ranks wait."""

THREADS, AT_A_TIME = 16, 2048

HEAD, TAIL = 1 << 16, 1 << 10
"""Bytes of a file's beginning and end that are read."""


@dataclass(frozen=True)
class Look:
    """What was found.

    Attributes:
        images: How many there were.
        looked_at: How many of them were looked at.
        unreadable: Of those that cannot be read, the path from the data's root, and what is wrong.
        root: Of the data; not kept with a run, whose data may be moved.
    """

    images: int
    looked_at: int
    unreadable: dict[str, str]
    root: Path

    def places_in(self, dataset: ImageDataset) -> frozenset[int]:
        """The numbers that those that cannot be read have in a data set of class folders, or in some images of it."""
        if not self.unreadable:
            return frozenset()
        [folder] = folders_of([dataset])
        found = folder.places_of([self.root / path for path in self.unreadable])
        if isinstance(dataset, Selection):
            found = np.flatnonzero(np.isin(dataset.indices, found))
        return frozenset(found.tolist())

    def describe(self, record: Path | None) -> str:
        """What was left out and what was not looked at, in words, a line each; "" where all is well.

        Args:
            record: The file that lists all; None for none.
        """
        lines = []
        if self.unreadable:
            faults = [f"{path} ({reason.partition(';')[0]})" for path, reason in self.unreadable.items()]
            all_in = f"; all in {record}" if record else ""
            lines.append(
                f"{len(self.unreadable):,} of {self.looked_at:,} images cannot be read and are left out:"
                f" {a_few_of(faults)}{all_in}"
            )
        if self.looked_at < self.images:
            lines.append(
                f"looked at {self.looked_at:,} of {self.images:,} images: others that cannot be read are left out of"
                " their batches, with a warning"
            )
        return "\n".join(lines)


def folders_of(datasets: Iterable[ImageDataset]) -> list[ImageFolderDataset]:
    """The class folders that data sets take their images from, each once; none of other data."""
    folders = [origin for dataset in datasets if isinstance(origin := origin_of(dataset), ImageFolderDataset)]
    return list({id(folder): folder for folder in folders}.values())


def look_for_all_ranks(trainer: Trainer, sets: ImageSets, root: Path, run_folder: Path | None) -> Look:
    """Find the images in class folders that cannot be read. A collective: what rank 0 finds holds for all ranks.

    Args:
        trainer: Whose ranks they are.
        sets: The images.
        root: Of the data.
        run_folder: As of `find_unreadable`, on rank 0.

    Raises:
        ValueError: No image of a set, or of a class of the training images, can be read.
    """
    named = {"training": sets.train, "validation": sets.validation}
    named |= {} if sets.test is None else {"test": sets.test}
    found = find_unreadable(folders_of(named.values()), root, run_folder) if trainer.is_global_zero else None
    found = trainer.strategy.broadcast(found)
    assert found is not None
    look = replace(found, root=root)
    if trainer.is_global_zero and (words := look.describe(run_folder and run_folder / RECORD)):
        print(words, flush=True)
    require_images_of_each_class(sets.train, look.places_in(sets.train))
    for name, images in named.items():
        if len(look.places_in(images)) == len(images):
            raise ValueError(f"none of the {len(images):,} {name} images in {root} can be read")
    return look


def find_unreadable(folders: Sequence[ImageFolderDataset], root: Path, run_folder: Path | None) -> Look:
    """Look the images through once for a run: what was found at its start holds for all of it.

    Args:
        folders: Where the images are.
        root: Of the data.
        run_folder: Where the result is kept, and found again when the run goes on; None keeps it nowhere.
    """
    if run_folder and (run_folder / RECORD).is_file():
        return Look(**json.loads((run_folder / RECORD).read_text()), root=root)
    look = look_through(folders, root)
    if run_folder:
        run_folder.mkdir(parents=True, exist_ok=True)
        kept = {name: value for name, value in vars(look).items() if name != "root"}
        with atomic_file(run_folder / RECORD) as file:
            file.write(json.dumps(kept, indent=1).encode("ascii"))  # names need not be UTF-8
    return look


def look_through(folders: Sequence[ImageFolderDataset], root: Path) -> Look:
    """Read the beginning and the end of each image; decode those that are unusual.

    Args:
        folders: Where the images are.
        root: Of the data, from which paths are given.
    """
    images = sum(map(len, folders))
    chosen = evenly_spaced(folders, min(images, MOST_IMAGES))
    unreadable: dict[str, str] = {}
    looked_at, began, said = 0, time.monotonic(), time.monotonic()
    with warnings.catch_warnings(), ThreadPoolExecutor(THREADS) as pool:
        warnings.simplefilter("ignore")  # of Pillow, in all threads
        while looked_at < len(chosen) and time.monotonic() - began < MOST_SECONDS:
            some = chosen[looked_at : looked_at + AT_A_TIME]
            unusual = pool.map(lambda image: is_unusual(image[0].path(image[1])), some)
            for (folder, index), is_to_be_decoded in zip(some, unusual, strict=True):
                if is_to_be_decoded and (fault := fault_of_image(folder, index)):
                    unreadable[os.path.relpath(folder.path(index), root)] = fault
            looked_at += len(some)
            if time.monotonic() - said > SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                print(f"syncbn: looked at {looked_at:,} of {len(chosen):,} images", file=sys.stderr, flush=True)
    return Look(images, looked_at, unreadable, root)


def evenly_spaced(folders: Sequence[ImageFolderDataset], count: int) -> list[tuple[ImageFolderDataset, int]]:
    """So many of the images of some folders, each by its folder and its number there."""
    numbers = np.arange(count) * sum(map(len, folders)) // max(1, count)
    chosen: list[tuple[ImageFolderDataset, int]] = []
    first = 0
    for folder in folders:
        places = numbers[(numbers >= first) & (numbers < first + len(folder))] - first
        chosen += [(folder, place) for place in places.tolist()]
        first += len(folder)
    return chosen


def fault_of_image(folder: ImageFolderDataset, index: int) -> str:
    """Why an image cannot be decoded; "" if it can."""
    try:
        Photo(folder, index, folder.encoded(index)).pixels()
    except ReadError as error:
        cause = error.__cause__
        return (getattr(cause, "strerror", None) or str(cause)) if cause else str(error)
    return ""


def is_unusual(path: Path) -> bool:
    """Whether a file's beginning and end leave it open that it is a whole image."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(HEAD)
            file.seek(max(0, size - TAIL))
            tail = file.read(TAIL)
    except OSError:
        return True
    kind = kind_of(head)
    if kind == "JPEG":
        frame = find_frame(head)
        has_end = END_OF_IMAGE in tail if size > HEAD else not is_cut_short(head)
        return not (frame and frame.height and frame.width and frame.bits == 8 and has_end)
    if kind == "PNG":
        return b"IEND" not in tail
    if kind == "WEBP":
        return int.from_bytes(head[4:8], "little") + 8 > size
    if kind == "BMP":
        return int.from_bytes(head[2:6], "little") > size
    return kind is None or not opens(path, OF_PILLOW[kind], size)


def opens(path: Path, kind: str, size: int) -> bool:
    """Whether Pillow takes a file's header, and the pixels begin within the file."""
    try:
        with Image.open(path, formats=[kind]) as image:
            return all(tile.offset < size for tile in image.tile)
    except Exception:  # whatever a decoder raises on bad data
        return False


def require_images_of_each_class(train: ImageDataset, left_out: Collection[int]) -> None:
    """Refuse training images of which a class has none left.

    Args:
        train: The training images.
        left_out: Numbers of those that cannot be read.

    Raises:
        ValueError: A class has images, but none that can be read.
    """
    lost = Counter(train.label(index) for index in left_out)
    counts = class_counts(train) if lost else []
    for label, count in sorted(lost.items()):
        if count == counts[label]:
            name = train.name(min(index for index in left_out if train.label(index) == label))
            raise ValueError(
                f"none of the {count:,} training images of the class {train.classes[label]!r} can be read, such as"
                f" {name}: mend or replace them, or remove the folder of the class"
            )
