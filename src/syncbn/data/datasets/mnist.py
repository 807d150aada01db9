"""MNIST: found in a folder, or downloaded into it.

Source: Y. LeCun, C. Cortes, C. Burges, "The MNIST database of handwritten digits".
"""

import gzip
import hashlib
import os
import socket
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from syncbn.data.datasets.idx import IDX_FILES, find_idx_file

MIRRORS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist",
    "https://storage.googleapis.com/cvdf-datasets/mnist",
    "http://yann.lecun.com/exdb/mnist",
)
"""Addresses of folders with the four gzipped files, in the order in which they are tried."""

SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
"""SHA-256 of the content of each file, unpacked: mirrors compress them differently."""

TIMEOUT_SECONDS = 30.0
"""How long a mirror may be silent."""


def default_folder() -> Path:
    """Where MNIST is kept unless the user names a folder: ``mnist`` in this package's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "syncbn" / "mnist"


def fetch_mnist(folder: Path, mirrors: Sequence[str] = MIRRORS) -> None:
    """Download those of MNIST's four files that a folder lacks, with a progress bar.

    Args:
        folder: Created where it is missing. Files that are there, gzipped or not, are taken as they are.
        mirrors: Addresses of folders with the gzipped files; each file comes from the first that has it.

    Raises:
        ValueError: ``folder`` is a file; or no mirror gave the right content, and the message says what was wrong with
            each.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file: name the folder that holds MNIST's four files")
    for (split, part), name in IDX_FILES.items():
        if find_idx_file(folder, split, part) is None:
            folder.mkdir(parents=True, exist_ok=True)
            _fetch_file(folder, name, mirrors)


def _fetch_file(folder: Path, name: str, mirrors: Sequence[str]) -> None:
    failures = []
    for mirror in mirrors:
        with tempfile.TemporaryDirectory(dir=folder) as unfinished:  # so that no file is there in part
            download = Path(unfinished) / f"{name}.gz"
            try:
                with _socket_timeout(TIMEOUT_SECONDS):
                    torch.hub.download_url_to_file(f"{mirror}/{name}.gz", str(download))
                found = hashlib.sha256(gzip.decompress(download.read_bytes())).hexdigest()
            except (OSError, EOFError, zlib.error) as error:
                failures.append(f"{mirror}: {error}")
                continue
            if found == SHA256[name]:
                download.replace(folder / download.name)
                return
            failures.append(f"{mirror}: the content has SHA-256 {found} instead of {SHA256[name]}")
    raise ValueError(
        f"cannot download MNIST's {name}.gz: put the four files into {folder} yourself ({'; '.join(failures)})"
    )


@contextmanager
def _socket_timeout(seconds: float) -> Iterator[None]:
    """A limit on the silence of a connection, which torch.hub has no option for."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
