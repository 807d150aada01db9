"""Labels that count the classes of a checkpoint: the classes of data and checkpoint are matched by their names."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from syncbn.data.datasets.base import ImageDataset
from syncbn.data.datasets.formats import ImageSets
from syncbn.data.datasets.selection import DatasetView, Selection, labels_of

SWITCH = "data.classes_by_name=false"
DATA = "the data"
UNNAMED = "the checkpoint does not name its classes: they cannot be compared with the data's, labels are by position"


class ClassMatch(NamedTuple):
    """How classes are found among others.

    Attributes:
        labels: Of each class, its number among the others: int64, shape (K,).
        remark: What a user should know of it, in words.
    """

    labels: np.ndarray
    remark: str


class RelabelledDataset(DatasetView):
    """A data set whose labels count the classes in another order, or among more of them.

    Args:
        dataset: Where the images come from, of K classes.
        classes: Names of the classes, in the order of the new labels.
        new_labels: Of each of the K classes, its new label: int64, shape (K,).
    """

    def __init__(self, dataset: ImageDataset, classes: Sequence[str], new_labels: np.ndarray) -> None:
        super().__init__(dataset)
        self.classes = tuple(classes)
        self.new_labels = new_labels

    @property
    def labels(self) -> np.ndarray:
        """Of the images: int64, shape (N,)."""
        return self.new_labels[labels_of(self.dataset)]

    def label(self, index: int) -> int:
        """The class of the image at ``index``."""
        return int(self.new_labels[self.dataset.label(index)])


def relabel_sets(sets: ImageSets, classes: Sequence[str], new_labels: np.ndarray) -> ImageSets:
    """The same images, labelled anew; a set of other classes than the training images' keeps its labels.

    Args:
        sets: Whose training images are of K classes.
        classes: Names of the classes, in the order of the new labels.
        new_labels: Of each of the K classes, its new label: int64, shape (K,).
    """
    own = tuple(sets.train.classes)

    def relabel(dataset: ImageDataset) -> ImageDataset:
        if tuple(dataset.classes) != own:
            return dataset
        if isinstance(dataset, Selection):
            return Selection(relabel(dataset.dataset), dataset.indices)
        return RelabelledDataset(dataset, classes, new_labels)

    test = None if sets.test is None else relabel(sets.test)
    return replace(sets, train=relabel(sets.train), validation=relabel(sets.validation), test=test)


def match_classes(
    names: Sequence[str],
    trained: Sequence[str],
    *,
    whole: bool,
    numbered: bool = False,
    here: str = DATA,
    there: str = "the checkpoint",
) -> ClassMatch | None:
    """Find classes among those of a checkpoint, by their names.

    Args:
        names: Of the classes, in the order of their labels, K of them.
        trained: Names of the checkpoint's classes, in the order of its outputs.
        whole: Whether each of the checkpoint's classes must be there: training goes on.
        numbered: Whether the data hold numbers of classes. These are then matched by position where the names, on
            either side, are the numbers 0, 1, 2 ... alone.
        here: What has the classes ``names``, for messages.
        there: What has the classes ``trained``, for messages.

    Returns:
        None where both are the same, in the same order.

    Raises:
        ValueError: A class is not among the others; the message names the first, and the switch.
    """
    names, trained = tuple(names), tuple(trained)
    if names == trained:
        return None
    unknown = [name for name in names if name not in set(trained)]
    lacking = [name for name in trained if name not in set(names)]
    enough = len(names) == len(trained) or (len(names) < len(trained) and not whole)
    if unknown and enough and numbered and (are_numbers(names) or are_numbers(trained)):
        labels = np.arange(len(names))
        remarks = [f"classes without names: the numbers in {here} are taken for the places in {there}"]
    elif unknown or (whole and lacking) or len({*names}) < len(names) or len({*trained}) < len(trained):
        raise ValueError(_difference(names, trained, whole, here, there))
    else:
        places = {name: label for label, name in enumerate(trained)}
        labels = np.array([places[name] for name in names], dtype=np.int64)
        moved = np.count_nonzero(labels != np.arange(len(labels)))
        moves = f"{moved:,} of {len(names):,} classes have another number in {there}: matched by their names"
        remarks = [moves] if moved else []
    if len(names) < len(trained):
        remarks.append(f"{len(trained) - len(names):,} of the {len(trained):,} classes of {there} have no image")
    return ClassMatch(labels, "; ".join(remarks))


def _difference(names: Sequence[str], trained: Sequence[str], whole: bool, here: str, there: str) -> str:
    """Why classes cannot be matched by name: the first that differs, and what to do."""
    pairs = ((here, names, there, trained), (there, trained, here, names))
    remedy = f"give the classes the same names, or take them by position ({SWITCH})"
    if whole and here == DATA:
        remedy += "; a training on other classes begins with --model.weights CHECKPOINT"
    for owner, classes, other, known in pairs:
        if missing := [name for name in classes if name not in set(known)]:
            lacks = [name for name in known if name not in set(classes)]
            nor = f", nor {lacks[0]!r} of {other} one of {owner}" if lacks else ""
            return (
                f"the class {missing[0]!r} of {owner} ({len(classes):,} classes) is no class of {other}"
                f" ({len(known):,}){nor}: {remedy}"
            )
    owner, twice = next(
        (owner, name) for owner, classes, *_ in pairs for name, count in Counter(classes).items() if count > 1
    )
    return f"{owner} has several classes called {twice!r}, in another order than the other: {remedy}"


def are_numbers(names: Sequence[str]) -> bool:
    """Whether classes are called 0, 1, 2 ... in this order, as those are that have no names."""
    return all(name == str(number) for number, name in enumerate(names))


def by_position(names: Sequence[str], trained: Sequence[str]) -> str:
    """What is to be said where labels are taken by position, in words; nothing of the same names."""
    others = [pair for pair in zip(names, trained, strict=False) if pair[0] != pair[1]]
    if not others:
        return ""
    ours, theirs = others[0]
    return (
        f"{len(others):,} of {len(names):,} classes have another name in the checkpoint ({ours!r} here, {theirs!r}"
        " there): labels are by position, as data.classes_by_name=false asks"
    )
