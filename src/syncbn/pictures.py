"""Text of the user's in pictures: drawn as it is written, in whatever letters, and never the end of a run."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

LISTED = 20
"""Names that a message lists at most."""


@contextmanager
def plain_text(*texts: str) -> Iterator[None]:
    """Within it, matplotlib draws text as it is, without mathematics, in fonts that have the letters.

    Args:
        texts: Whose letters are looked for, beside those of matplotlib's usual font.
    """
    from matplotlib import rc_context

    families, _ = fonts_for("".join(texts))
    with rc_context({"text.parse_math": False, "text.usetex": False, "font.family": families}):
        yield


@contextmanager
def unless_it_fails(picture: Path) -> Iterator[None]:
    """Within it a picture is drawn; where that fails a line says so, and what follows goes on."""
    try:
        yield
    except Exception as error:  # whatever matplotlib may raise
        reason = " ".join(str(error).split())[:200]
        print(f"syncbn: {picture} could not be drawn: {type(error).__name__}: {reason}", file=sys.stderr, flush=True)


def drawable_names(names: Sequence[str]) -> list[str]:
    """Names of classes as a picture can show them: where no font here has their letters, their numbers.

    The first time that this happens to a name, a line says which number is which name.
    """
    _, missing = fonts_for("".join(names))
    numbered = {number: name for number, name in enumerate(names) if missing.intersection(name)}
    if numbered:
        say_numbers(tuple(numbered.items()))
    return [f"class {number}" if number in numbered else name for number, name in enumerate(names)]


@cache
def say_numbers(numbered: tuple[tuple[int, str], ...]) -> None:
    """Print a list of numbers and names, once."""
    listed = "; ".join(f"{number} = {name!a}" for number, name in numbered[:LISTED])
    more = f"; and {len(numbered) - LISTED} more" if len(numbered) > LISTED else ""
    print(
        f"syncbn: no font here has the letters of {len(numbered)} names of classes: pictures show numbers, counted"
        f" from 0: {listed}{more}",
        file=sys.stderr,
        flush=True,
    )


def fonts_for(text: str) -> tuple[list[str], set[str]]:
    """The families of fonts by which matplotlib can draw a text, and the letters that none of them has."""
    from matplotlib import font_manager, rcParams

    families = list(rcParams["font.family"])
    usual = font_manager.get_font(font_manager.findfont(font_manager.FontProperties(family=families)))
    missing = set(text) - {"\n", *map(chr, usual.get_charmap())}
    for font in font_manager.fontManager.ttflist if missing else ():
        found = missing.intersection(letters_of(font.fname)) if font.name not in families else set()
        if found:
            families.append(font.name)
            missing -= found
        if not missing:
            break
    return families, missing


@cache
def letters_of(file: str) -> Iterable[str]:
    """The letters that a font file has."""
    from matplotlib import font_manager

    try:
        return frozenset(map(chr, font_manager.get_font(file).get_charmap()))
    except (OSError, RuntimeError):  # no font any more, or a broken one
        return frozenset()
