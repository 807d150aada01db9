"""Which parameters and layers a user's patterns mean."""

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from torch import nn


def is_selected(name: str, patterns: Iterable[str]) -> bool:
    """Whether a pattern matches a module's or parameter's dotted name, or that of a module it lies in.

    Patterns are the shell's: ``*`` stands for any characters, dots included. "stem" so means everything in the
    module stem, and "*.bn" every layer of that name with its parameters.
    """
    parts = name.split(".")
    paths = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    return any(fnmatchcase(path, pattern) for pattern in patterns for path in paths)


def select_parameters(network: nn.Module, patterns: Sequence[str], option: str) -> dict[str, nn.Parameter]:
    """The parameters that patterns mean, by name.

    Args:
        network: Whose parameters.
        patterns: See `is_selected`.
        option: Where the patterns were given, for the message.

    Raises:
        ValueError: A pattern matches nothing; the message lists what there is.
    """
    parameters = dict(network.named_parameters(remove_duplicate=False))
    for pattern in patterns:
        if not any(is_selected(name, [pattern]) for name in parameters):
            top_level = dict.fromkeys(name.partition(".")[0] for name in parameters)
            raise ValueError(
                f"{option}: the pattern {pattern!r} matches no parameter and no module with parameters; the network"
                f" has {', '.join(top_level)}, and what is in them, such as {next(iter(parameters))}"
            )
    return {name: parameter for name, parameter in parameters.items() if is_selected(name, patterns)}
