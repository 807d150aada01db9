"""What parsers of command lines say: help in plain text, and of a misspelt name the one that was probably meant."""

import inspect
import pydoc
import re
from argparse import ArgumentParser
from collections.abc import Iterator

from syncbn.verbs import MEANT, closest

MISSPELT = re.compile(
    r"unrecognized arguments: (?:.*? )??(?P<option>--[^\s=]+).*"
    r"|does not accept option '(?P<key>[^']+)'"
    r"|class_path '(?P<owner>[^']+)':[\s-]*Option '(?P<argument>[^']+)' is not accepted"
    r"|invalid choice: '(?P<choice>[^']+)' \(choose from (?P<choices>.*)\)",
    re.DOTALL,
)
"""Errors of argparse and jsonargparse about a name that is not known."""

MARKUP = (
    (re.compile(r":(?:py:)?\w+:`~?\.?([^`]*)`"), r"\1"),  # of roles
    (re.compile(r"`([^`<]+?)\s*<([^`>]*)>`__?"), r"\1 (\2)"),  # of links
    (re.compile(r"``([^`]*)``"), r"\1"),
)
"""Of reStructuredText, and the plain text for it."""


def plain_text(text: str) -> str:
    """Help without the markup of reStructuredText."""
    for markup, plain in MARKUP:
        text = markup.sub(plain, text)
    return text


def options_of(parser: ArgumentParser) -> Iterator[str]:
    """The options of a parser and of its subcommands, as ``--model.variant``."""
    for action in parser._actions:
        yield from (name for name in action.option_strings if not name.endswith(("+", ".help")))
        if isinstance(action.choices, dict):
            for subparser in action.choices.values():
                yield from options_of(subparser)


def with_suggestion(message: str, parser: ArgumentParser) -> str:
    """An error of a parser's, with what was probably meant where it is about a name that is not known."""
    found = MISSPELT.search(message)
    if found is None or MEANT in message:  # which a parser may raise again
        return message
    if argument := found["argument"]:
        owner = pydoc.locate(found["owner"])
        hint = closest(argument, [*inspect.signature(owner).parameters] if callable(owner) else [])
    elif choice := found["choice"]:
        hint = closest(choice, re.findall(r"[^\s',]+", found["choices"]))
    elif key := found["key"]:
        hint = closest(key, [name.lstrip("-") for name in options_of(parser)])
    else:
        hint = closest(found["option"], [*options_of(parser)])
    return message[: found.end()] + hint + message[found.end() :]
