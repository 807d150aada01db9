"""Which folders of a data set are its training, validation and test images, whatever they are called."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

NAMES = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "tst"),
}
"""By which a split is known, in any case, alone or with ``set`` after it ("Train", "training_set", "valid")."""

JUNK = frozenset(
    {"__macosx", "@eadir", "@recycle", "#recycle", "#snapshot", "lost+found", "$recycle.bin"}
    | {"system volume information", "__pycache__"}
)
"""Folders that systems leave behind, in small letters: no classes, and nothing in them is an image of one."""


LOOKED_AT = 64
"""Entries of a folder that is either a class, of many images, or a data set, of few folders."""


NAMED = 5
"""Of the files and folders in a message, at most."""


def split_of(name: str) -> str | None:
    """The split that a name stands for, "train", "val" or "test"; None for others."""
    plain = "".join(letter for letter in name.lower() if letter not in "_- ").removesuffix("set")
    return next((split for split, names in NAMES.items() if plain in names), None)


def is_visible(name: str) -> bool:
    """Whether a file or folder is the user's, by its name: neither hidden nor left behind by a system."""
    return name[0] != "." and name.lower() not in JUNK


def visible_folders(folder: Path) -> list[Path]:
    """The folders in a folder, sorted, without hidden ones and junk."""
    with os.scandir(folder) as entries:
        return _visible_folders_of(entries)


def _first_folders(folder: Path) -> list[Path]:
    """The folders among the first entries of a folder: of one with a million images no more is read."""
    with os.scandir(folder) as entries:
        return _visible_folders_of(islice(entries, LOOKED_AT))


def _visible_folders_of(entries: Iterable["os.DirEntry[str]"]) -> list[Path]:
    return sorted(Path(entry.path) for entry in entries if is_visible(entry.name) and entry.is_dir())


@dataclass(frozen=True)
class SplitFolders:
    """The folders of a data set.

    Attributes:
        of: By split, "train" and those of "val" and "test" that there are; each holds a folder for each class.
        unused: The folders beside them.
    """

    of: dict[str, Path]
    unused: tuple[Path, ...] = ()


def find_splits(root: Path) -> SplitFolders:
    """The splits of a data set: ``root/train/<class>/``, ``root/val/<class>/`` ..., or ``root/<class>/`` alone.

    Raises:
        ValueError: They cannot be told: two folders are of the same split, training images are missing, names of splits
            are among those of classes, or the classes lie a folder higher or deeper; the message says which to name.
    """
    named = _named_splits(root)
    if "train" in named:
        _require_classes(named["train"], root)
        if "test" in named and not visible_folders(named["test"]):
            del named["test"]  # images without labels, to be predicted
        used = set(named.values())
        return SplitFolders(named, tuple(entry for entry in visible_folders(root) if entry not in used))
    if named:
        there = ", ".join(sorted(folder.name for folder in named.values()))
        raise ValueError(
            f"{root} has {there}, but no training images: name their folder train"
            " (if these are classes, put the classes into a folder train)"
        )
    _require_classes(root, root)
    beside = _named_splits(root.absolute().parent) if split_of(root.absolute().name) == "train" else {}
    return SplitFolders({"train": root}, tuple(folder for split, folder in beside.items() if split != "train"))


def _named_splits(root: Path) -> dict[str, Path]:
    """The folders in ``root`` that are called as splits."""
    found: dict[str, Path] = {}
    for entry in visible_folders(root):
        split = split_of(entry.name)
        if split in found:
            raise ValueError(
                f"{root} has two folders of {split} images, {found[split].name} and {entry.name}: rename or join them"
            )
        if split is not None:
            found[split] = entry
    return found


def _require_classes(folder: Path, root: Path) -> None:
    """Refuse a folder whose folders cannot be classes.

    Raises:
        ValueError: There is none, they hold the classes, or their names are those of splits.
    """
    folders = visible_folders(folder)
    if not folders:
        above = root.absolute().parent
        above = above if split_of(above.name) is None else above.parent
        hint = f"if it is a class itself, name data.root={above}"
        if folder != root:
            hint = f"if {folder.name} is a class, put the classes into a folder train"
        raise ValueError(f"{folder} holds no class folders; images are looked for in {folder}/<class>/ ({hint})")
    for entry in folders:
        if any(split_of(within.name) == "train" for within in _first_folders(entry)):
            raise ValueError(f"{folder} is a folder too high: name data.root={entry}, where the training images are")
    if all(split_of(entry.name) for entry in folders):
        names = ", ".join(entry.name for entry in folders)
        raise ValueError(f"the folders in {folder} are called {names}, as splits and not as classes: name one of them")
    if len(folders) == 1:
        within = _first_folders(folders[0])
        hint = f"; name data.root={folders[0]} if {within[0].name} is one" if within and folder == root else ""
        raise ValueError(f"{folder} holds one class, {folders[0].name}: two or more are needed to tell apart{hint}")


def not_used(paths: Sequence[Path], folder: Path) -> tuple[str, ...]:
    """Files and folders that no split takes, in words."""
    names = [os.path.relpath(path, folder) for path in paths]
    return (f"not used: {a_few_of(names)}",) if names else ()


def a_few_of(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - NAMED:,} more" if len(names) > NAMED else ""
    return f"{', '.join(names[:NAMED])}{more}"
