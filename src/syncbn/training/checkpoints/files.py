"""Checkpoint files that are whole or not there: how they are written, verified and chosen."""

import errno
import shutil
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from syncbn.files import PARTIAL, atomic_file, remove

NEEDED = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "global_step")
"""What training cannot go on without."""


def read_without_tensors(path: str | Path) -> Any:
    """What a checkpoint holds, its tensors with sizes and dtypes alone: quick, however large the file is."""
    return torch.load(path, map_location="meta", weights_only=True, mmap=True)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoints atomically; a training goes on where one cannot be written, unless it is the first.

    A full disk may be emptied before long, and to stop would cost what has been trained since the last checkpoint.
    So the fault is printed, everything older is kept, and the next checkpoint tries again. A run that cannot write its
    first one is configured wrongly, and stops.

    Attributes:
        failure: Why the latest checkpoint could not be written; "" where it was.
    """

    def __init__(self) -> None:
        self.failure = ""
        self._has_written = False

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """Write a file.

        Raises:
            ValueError: It is the first one and cannot be written.
        """
        if storage_options is not None:
            raise TypeError("AtomicCheckpointIO takes no storage_options")
        path = Path(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_checkpoint(checkpoint, path)
        except OSError as error:
            self.failure = describe_failure(path, error)
            if not self._has_written:
                raise ValueError(self.failure) from error
            print(f"syncbn: {self.failure}; training goes on without it", file=sys.stderr, flush=True)
        else:
            self.failure = ""
            self._has_written = True

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a file, unless what should have replaced it could not be written."""
        if not self.failure:
            super().remove_checkpoint(path)


class FailingFile:
    """A file that keeps its first error, of which torch's writer says only what follows from it.

    Args:
        file: Open for writing.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write."""
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        """Flush."""
        self._file.flush()


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write a checkpoint atomically.

    Raises:
        OSError: It cannot be written.
    """
    with atomic_file(path) as file:
        failing = FailingFile(file)
        try:
            torch.save(checkpoint, failing)  # type: ignore[arg-type]
        except RuntimeError as error:
            raise failing.error or error from error


def describe_failure(path: Path, error: OSError) -> str:
    """Why a checkpoint could not be written, with the free space of its disk, in one line."""
    reason = error.strerror or str(error)
    try:
        free = f"{shutil.disk_usage(path.parent).free / 1e6:,.1f} MB are free there"
    except OSError:
        free = "its folder cannot be read"
    remedy = "; make room" if error.errno in (errno.ENOSPC, errno.EDQUOT) else ""
    return f"the checkpoint {path} could not be written: {reason} ({free}{remedy}); earlier checkpoints are kept"


def fault_of(path: Path, step: int | None = None) -> str:
    """What is wrong with a checkpoint; "" where it is whole.

    A file's checksums are verified, and what training needs must be in it. A folder, as sharded strategies write, is
    taken to be whole by its name, which it is given last.

    Args:
        path: Of the checkpoint.
        step: A file has to be of this step, where it is given: on a full disk an older one may have stayed.
    """
    if path.is_dir():
        return ""
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            return f"the checksum of {damaged} in it is wrong"
        checkpoint = read_without_tensors(path)
    except Exception as error:  # whatever unpickling junk may raise
        return f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
    missing = [name for name in NEEDED if name not in checkpoint]
    if missing:
        return f"it has no {', '.join(missing)}"
    found = checkpoint["global_step"]
    return f"it is of step {found}, not {step}" if step not in (None, found) else ""


def checkpoints_of(config: Any) -> list[str]:
    """The checkpoints that a subcommand's config names: ``ckpt_path``, or several."""
    return [config["ckpt_path"]] if config.get("ckpt_path") else config.get("checkpoints") or []


def step_of(path: Path) -> int:
    """The optimiser steps after which one of `Checkpointing`'s checkpoints was written."""
    return int(path.stem.partition("=")[2])


def by_step(folder: Path) -> list[Path]:
    """`Checkpointing`'s checkpoints in a folder, the newest first."""
    return sorted(folder.glob("step=*.ckpt"), key=step_of, reverse=True)


def newest_whole(folder: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole; broken ones are named, and put aside under another name.

    Args:
        folder: That of the checkpoints.
        say: Is told of each broken one.
    """
    for partial in folder.glob(f".*{PARTIAL}"):
        remove(partial)
    for path in by_step(folder):
        fault = fault_of(path)
        if not fault:
            return path
        aside = path.with_suffix(".broken")
        path.replace(aside)
        say(f"{path} is broken and left out ({fault}); it is now {aside.name}")
    return None


CHECKPOINT_DEFAULTS: dict[str, Any] = {
    "monitor": "val_top1",
    "mode": "max",
    "filename": "best-epoch={epoch}-val_top1={val_top1:.4f}",
    "auto_insert_metric_name": False,
    "enable_version_counter": False,  # going on from before the best, it is written anew, under its name
}


def with_atomic_checkpoints(plugins: Any) -> list[Any]:
    """A trainer's plugins, and the one that writes checkpoints atomically."""
    given = [] if plugins is None else plugins if isinstance(plugins, list) else [plugins]
    return [*given, AtomicCheckpointIO()]
