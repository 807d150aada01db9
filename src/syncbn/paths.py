"""Paths that a user writes, in YAML or on the command line, and names of files in what is written.

``~`` is the home folder, of every option and verb.
"""

import os
from pathlib import Path
from typing import Any, NoReturn, TextIO

from jsonargparse import ArgumentParser, Namespace

from syncbn.options import plain_text, with_suggestion

ESCAPE = "backslashreplace"
"""What is done with characters that an encoding does not have; in JSON it is what the format has for them."""


def open_text(path: Path) -> TextIO:
    r"""A new text file, in UTF-8; what is not of it, as in names of files of another encoding, is escaped: \udcfc."""
    return path.open("w", newline="", encoding="utf-8", errors=ESCAPE)


def expand_home(value: Any) -> Any:
    """What a command was given, with each text and path that begins with ``~`` expanded, however deep it lies.

    Args:
        value: Of any type; a `Namespace` and what lies in it is changed in place.

    Returns:
        The value; ``~name`` stays what it is where there is no such user.
    """
    if isinstance(value, str):
        return os.path.expanduser(value)  # noqa: PTH111 (pathlib raises where there is no such user)
    if type(value) is type(Path()):
        return value.expanduser()
    if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
        return type(value)(map(expand_home, value))
    if isinstance(value, dict):
        return {name: expand_home(item) for name, item in value.items()}
    if isinstance(value, Namespace):
        for name, item in vars(value).items():
            setattr(value, name, expand_home(item))
    return value


class ExpandingParser(ArgumentParser):
    """A parser of command lines whose values are expanded, and which says what was probably meant."""

    def parse_args(self, *args: Any, **kwargs: Any) -> Any:
        """As every parser's, with ``~`` expanded."""
        return expand_home(super().parse_args(*args, **kwargs))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """As jsonargparse's, with what was probably meant."""
        super().error(with_suggestion(message, self), ex)

    def format_help(self, *arguments: Any) -> str:
        """As jsonargparse's, without markup."""
        return plain_text(super().format_help(*arguments))
