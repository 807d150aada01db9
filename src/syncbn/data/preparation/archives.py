"""Where the members of a tar lie, from its headers alone, also where the tar is damaged."""

import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple


class Member(NamedTuple):
    """A file in a tar.

    Attributes:
        name: As the tar has it.
        offset: Where in the outermost file its bytes are.
        size: How many there are.
        whole: Whether they all are there; the archive may end before.
    """

    name: str
    offset: int
    size: int
    whole: bool


def scan_archive(path: Path, start: int = 0, end: int | None = None) -> tuple[list[Member], list[str]]:
    """List the files of an uncompressed tar without reading their contents.

    The archive may itself lie in another, as the classes of ImageNet do: its members have known places in the outer
    file. Behind a damaged header the next sound one is searched for, so that damage costs no more than it hit.

    Args:
        path: Of the outermost file.
        start: Where in it the archive begins, in bytes.
        end: Where it ends; None for the end of the file.

    Returns:
        The members, and what is damaged, in words.

    Raises:
        OSError: The file cannot be read.
    """
    size = path.stat().st_size
    end = size if end is None else end
    members: list[Member] = []
    damages: list[str] = []
    expected = start  # of the next header
    with path.open("rb") as file:
        try:
            for info in _headers(file, start):
                if info.offset >= end:
                    break
                if info.offset > expected:
                    damages.append(f"damaged header {_after(members)}, {info.offset - expected} bytes skipped")
                expected = info.offset_data + -(-info.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
                if not info.isreg():
                    continue
                whole = info.offset_data + info.size <= min(end, size)
                members.append(Member(info.name, info.offset_data, info.size, whole))
                if not whole:
                    damages.append(f"the archive ends within {info.name}")
        except tarfile.TarError as error:
            if not damages:
                damages.append(f"{error} {_after(members)}")
        file.seek(expected)
        marker = file.read(tarfile.BLOCKSIZE) if expected < end else b""
    if marker != bytes(tarfile.BLOCKSIZE) and not damages:  # where all is well zeros end an archive
        damages.append(f"the archive breaks off {_after(members)}")
    return members, damages


def _headers(file: BinaryIO, start: int) -> Iterator[tarfile.TarInfo]:
    """The sound headers of the tar that begins at ``start``, with their places in ``file``, to the file's end."""
    file.seek(start)
    with tarfile.open(fileobj=file, mode="r:", ignore_zeros=True) as archive:  # it skips unsound headers too
        yield from archive


def _after(members: list[Member]) -> str:
    return f"after {members[-1].name}" if members else "at the beginning"
