"""Files and folders that are whole or not there."""

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

PARTIAL = ".partial"
"""How the names of files end that are being written; what a kill leaves of them is removed at the next start."""


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write into that takes the place of ``path`` in one step, when all of it is on the disk.

    Raises:
        OSError: It cannot be written; ``path`` is what it was.
    """
    partial = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}{PARTIAL}")
    try:
        with partial.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        publish(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def publish(partial: Path, path: Path) -> None:
    """Give a file or folder its final name, and make sure that a power cut does not take it back."""
    if path.is_dir():  # which cannot be replaced in one step
        remove(path)
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def remove(path: Path) -> None:
    """Remove a file, or a folder and what is in it."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
