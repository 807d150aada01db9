"""The ``syncbn`` command: ``syncbn fit | validate | test | predict --config configs/fashion_mnist.yaml``."""

import importlib
import signal
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from syncbn.errors import describe_error

VERBS: dict[str, str] = {
    "benchmark": "syncbn.benchmarks.command",
    "data": "syncbn.data.show",
    "doctor": "syncbn.doctor.command",
    "export": "syncbn.inference.export",
    "import": "syncbn.models.weights.command",
    "paper": "syncbn.experiments.command",
    "prepare": "syncbn.data.preparation.command",
}
"""Verbs besides those of Lightning, each with the module that holds it: COMMANDS, its functions, or `run`."""

PREDICTS_DATA_SET = ("--config", "-c", "--ckpt_path", "--checkpoints")
"""Options of Lightning's ``predict``, of a data set; without one of them ``predict`` takes weights and images."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; a mistake of the user's ends in one line and exit status 1, Ctrl-C in 130, without a traceback.

    Args:
        arguments: The words after ``syncbn``; None takes those of the command line. The environment variable
            ``SYNCBN_TRACEBACK=1`` shows the traceback of every error.
    """
    if arguments is not None:
        sys.argv[1:] = arguments  # where Lightning looks for them when it starts the other ranks
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # for a user's own callbacks, as with ``python -m syncbn``
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files that the screen's encoding does not have
    try:
        run_command()
    except KeyboardInterrupt:  # while it imports or prepares, too
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        description = describe_error(error)
        if description is None:
            raise
        print(description, file=sys.stderr)
        sys.exit(1)


@cache
def refuse_repeated_keys() -> None:
    """Have configs refused that say a key twice: PyYAML takes the last, and what is below the first is lost."""
    import yaml
    from jsonargparse import get_loader, set_loader

    load = get_loader("yaml")

    def load_checked(text: str) -> Any:
        for key, first, second in repeated_keys(yaml.compose(text, yaml.SafeLoader)):
            raise yaml.YAMLError(
                f"the key {key!r} is in line {first} and again in line {second}: join what is below them"
            )
        return load(text)

    set_loader("yaml", load_checked, (yaml.YAMLError,))


def repeated_keys(node: Any) -> Iterator[tuple[str, int, int]]:
    """The keys of a YAML document that have been there before in the same mapping, however deep; with both lines."""
    lines: dict[str, int] = {}
    for item in node.value if hasattr(node, "value") and not isinstance(node.value, str) else ():
        if isinstance(item, tuple):  # of a mapping
            key, item = item
            line = key.start_mark.line + 1
            if str(key.value) in lines:
                yield str(key.value), lines[str(key.value)], line
            lines[str(key.value)] = line
        yield from repeated_keys(item)


def run_command() -> None:
    """Parse the command line and do what it says."""
    refuse_repeated_keys()
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    if verb in VERBS:
        run_verb(verb, sys.argv[2:])
        return
    of_data_set = any(word.partition("=")[0] in PREDICTS_DATA_SET for word in sys.argv[2:])
    if verb == "predict" and not of_data_set:
        from syncbn.inference.predict import run

        sys.exit(run(sys.argv[2:]))
    from syncbn.training.command import SyncBNCLI

    SyncBNCLI()


def run_verb(verb: str, arguments: Sequence[str]) -> None:
    """Run one of a verb's functions, whose parameters are the options of the command."""
    from jsonargparse import auto_cli

    from syncbn.paths import ExpandingParser

    module = importlib.import_module(VERBS[verb])
    if hasattr(module, "run"):
        module.run(arguments)
        return
    options: dict[str, Any] = {"prog": f"syncbn {verb}", "exit_on_error": False, "parser_class": ExpandingParser}
    auto_cli(module.COMMANDS, args=list(arguments), **options)
