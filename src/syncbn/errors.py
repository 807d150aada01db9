"""How an error reaches whoever typed the command: in one line, after its place in their own code if it lies there."""

import linecache
import os
import re
import site
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import TracebackType

SHOW_ALL = "SYNCBN_TRACEBACK"
"""Environment variable: 1 shows the traceback of every error."""

LONGEST = 500
"""Characters of a message of a library's: about three lines."""

EXPLAINING_LIBRARIES = ("jsonargparse", "lightning", "lightning_utilities", "torchmetrics")
"""What these raise by themselves is meant for the user, whatever its type."""

LINK_FAILED = "Call to compute_fn of link"
WORKER_FAILED = "Original Traceback"
WORKER_DIED = "DataLoader worker (pid"


def describe_error(error: Exception) -> str | None:
    """What to print of an error: a traceback of the user's own code, if it came by there, and a line.

    Returns:
        None where the whole traceback is wanted: of a fault that nobody foresaw, or as `SHOW_ALL` asks.
    """
    if os.environ.get(SHOW_ALL, "0") != "0":
        return None
    for link in chain_of(error):
        if str(link).startswith(WORKER_DIED):  # torch raises it from a signal, wherever this process is
            return line_of(link)
        own = next((frame for frame in frames_of(link) if is_own_code(frame.tb_frame.f_code.co_filename)), None)
        if own is not None:
            shown = "".join(traceback.format_exception(type(link), link, own, chain=False))
            return shown + line_of(error, typed=error is link)
    return line_of(error) if explains_itself(error) else None


def line_of(error: BaseException, typed: bool = False) -> str:
    """An error in one line, which says the rank; ``typed`` says the error's type, too."""
    rank = int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0")))
    prefix = f"syncbn: error (rank {rank}):" if rank else "syncbn: error:"
    message = one_line(str(error))
    if len(message) > LONGEST and package_of(origin(error)) in EXPLAINING_LIBRARIES:
        message = f"{message[:LONGEST]} ... ({SHOW_ALL}=1 shows all of it)"
    if typed and not isinstance(error, ValueError):
        message = f"{type(error).__name__}: {message}"
    return f"{prefix} {message}"


def explains_itself(error: Exception) -> bool:
    """Whether an error is a mistake in what was asked for, which its message explains."""
    if isinstance(error, (ValueError, OSError)):
        return True
    names = (  # looked up where they are loaded, since Lightning takes seconds to import
        ("jsonargparse", "ArgumentError"),
        ("lightning.fabric.utilities.exceptions", "MisconfigurationException"),
        ("syncbn.agreement", "LayerMismatch"),
    )
    kinds = tuple(getattr(sys.modules[module], name) for module, name in names if module in sys.modules)
    return isinstance(error, kinds) or was_raised_by_library(error)


def was_raised_by_library(error: Exception) -> bool:
    """Whether a statement ``raise`` of a library that explains its errors made this one, rather than an accident."""
    last = origin(error)
    if package_of(last) not in EXPLAINING_LIBRARIES:
        return False
    assert last is not None
    line = linecache.getline(last.tb_frame.f_code.co_filename, last.tb_lineno)
    return line.lstrip().startswith("raise ")


def one_line(message: str) -> str:
    """A message without line breaks; of what wraps another error, and of jsonargparse's lists, only what matters."""
    if message.startswith(LINK_FAILED):
        message = message.partition(" failed: ")[2]
    if WORKER_FAILED in message:
        message = message.strip().splitlines()[-1].partition(": ")[2]
    message = without_subtypes(" ".join(message.split()))
    if message.startswith(WORKER_DIED) and "Killed" in message:
        message += " Perhaps the machine ran out of memory (dmesg says so): with fewer workers less is needed."
    return message


UNION = re.compile(r"Does not validate against any of the Union subtypes Subtypes: \[.*?\] Errors: ")
SUBCLASS = re.compile(r"- Not a valid subclass of \S+ Subclass types expect one of:.*?\(implicit class_path\) ?")
GIVEN = re.compile(r" ?Given value type: <class '(\w+)'> Given value: (.*?)(?= - Expected |$)| ?Given value type: .*")
KEY = re.compile(r'Parser key "([^"]+)":')
EXPECTED = re.compile(r"Expected a (?:<class '(?:\w+\.)*(\w+)'>|typing\.Literal\[(.*)\])")
GOT = re.compile(r"\. Got value: (.*)$")


def without_subtypes(text: str) -> str:
    """A message of jsonargparse's without its lists of what a value is not.

    Of a value that may be of several types it says for each why it is none. Where one of these reasons is about the
    value itself, that one is kept; else the types are.

    Args:
        text: In one line; other messages come back as they are.
    """
    if not KEY.search(text) and not UNION.search(text):
        return text
    given = GIVEN.search(text)
    value = given.group(2) if given and given.group(1) in ("str", "int", "float", "bool") else None
    text = SUBCLASS.sub("", UNION.sub("", text[: given.start()] if given else text))
    if got := GOT.search(text):
        value, text = got.group(1), text[: got.start()]
    head, *items = (part.strip() for part in re.split(r"(?:^|(?<= ))- ", KEY.sub(r"\1:", text)))
    if not items and (at := head.find("Expected a")) >= 0:
        head, items = head[:at], [head[at:]]
    reasons = [item for item in items if item and not item.startswith("Expected a")]
    parts = [head, "; ".join(reasons).replace(":; ", ": ")]
    if not reasons or reasons[-1].endswith(":"):
        types = dict.fromkeys(name for item in items if (name := expected_type(item)))
        not_this = f", not {'null' if value == 'None' else value}" if value is not None else ""
        parts.append(f"expected {' or '.join(types)}{not_this}")
    return EXPECTED.sub(r"expected \1\2", " ".join(part.strip() for part in parts if part))


def expected_type(item: str) -> str:
    """The type that a reason of jsonargparse's names; "" where it names none."""
    if item.startswith("Expected a dot import path string"):
        return "a class path"
    found = EXPECTED.match(item)
    name = (found.group(1) or found.group(2)) if found else ""
    return "null" if name == "NoneType" else name


def chain_of(error: BaseException) -> Iterator[BaseException]:
    """An error and what caused it, the first cause first."""
    cause = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    if cause is not None:
        yield from chain_of(cause)
    yield error


def frames_of(error: BaseException) -> Iterator[TracebackType]:
    """The places that an error came by, the innermost last."""
    place = error.__traceback__
    while place is not None:
        yield place
        place = place.tb_next


def origin(error: BaseException) -> TracebackType | None:
    """Where an error was raised."""
    return next(reversed([*frames_of(error)]), None)


def package_of(place: TracebackType | None) -> str:
    """The package whose code a place lies in; "" for none."""
    return "" if place is None else place.tb_frame.f_globals.get("__name__", "").partition(".")[0]


@cache
def is_own_code(file: str) -> bool:
    """Whether a file is neither this package's nor that of a library."""
    path = Path(file)
    if not path.is_file():  # "<string>", "<frozen ...>"
        return False
    paths = sysconfig.get_paths()
    libraries = [paths[name] for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    folders = [Path(__file__).parent, *map(Path, (*libraries, *site.getsitepackages(), site.getusersitepackages()))]
    return not any(path.resolve().is_relative_to(folder.resolve()) for folder in folders)
