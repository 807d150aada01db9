"""The ``syncbn`` command: ``syncbn fit | validate | test | predict --config configs/fashion_mnist.yaml``.

What is imported here delays `syncbn --help`; the rest is imported where it is used.
"""

import importlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

from syncbn import __version__
from syncbn.verbs import MODULES, OF_TRAINER, closest, describe_verbs

PREDICTS_DATA_SET = ("--config", "-c", "--ckpt_path", "--checkpoints")
"""Options of Lightning's ``predict``, of a data set; without one of them ``predict`` takes weights and images."""

RANKS = ("RANK", "SLURM_PROCID", "LOCAL_RANK")
"""Variables by which launchers tell a process its number."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command; a mistake of the user's ends in one line and exit status 1, Ctrl-C in 130, without a traceback.

    Args:
        arguments: The words after ``syncbn``; None takes those of the command line. The environment variable
            ``SYNCBN_TRACEBACK=1`` shows the traceback of every error.
    """
    if arguments is not None:
        sys.argv[1:] = arguments  # where Lightning looks for them when it starts the other ranks
    if sys.argv[1:2] in (["--help"], ["-h"], ["--version"]):
        answer = f"syncbn {__version__}" if sys.argv[1] == "--version" else describe_verbs(__version__)
        try:
            print(answer, flush=True)
        except BrokenPipeError:  # `syncbn --help | head`; the interpreter would flush again as it exits
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if (folder := os.getcwd()) not in sys.path:  # noqa: PTH109 (pathlib takes longer to import)
        sys.path.append(folder)  # for a user's own callbacks, as with ``python -m syncbn``
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files that the screen's encoding does not have
    try:
        run_command()
    except KeyboardInterrupt:  # while it imports or prepares, too
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        from syncbn.errors import describe_error

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
    # As jsonargparse does: libyaml takes {layers: [a?]}, the pure Python loader does not.
    dialect = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

    def load_checked(text: str) -> Any:
        for key, first, second in repeated_keys(yaml.compose(text, dialect)):
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
    """Parse the command line and do what it says.

    Raises:
        ValueError: There is no verb, or no such verb.
    """
    verb = sys.argv[1] if len(sys.argv) > 1 else ""
    if not verb:
        print(describe_verbs(__version__), file=sys.stderr)
        raise ValueError("a verb is missing, such as in: syncbn fit --config configs/fashion_mnist.yaml")
    if not verb.startswith("-") and verb not in (*MODULES, *OF_TRAINER):
        raise ValueError(f"there is no verb {verb!r} (syncbn --help lists all){closest(verb, [*MODULES, *OF_TRAINER])}")
    if sys.argv[1:] == ["fit"]:
        from syncbn.recipes import describe_recipes

        print(describe_recipes(), file=sys.stderr)
        raise ValueError("fit needs a config: syncbn fit --config FILE; syncbn fit --help lists what it may say")
    announce(verb)
    refuse_repeated_keys()
    if verb in MODULES:
        run_verb(verb, sys.argv[2:])
        return
    if verb == "predict" and not predicts_data_set(sys.argv[2:]):
        from syncbn.inference.predict import run

        sys.exit(run(sys.argv[2:]))
    from syncbn.training.command import SyncBNCLI

    SyncBNCLI()


def predicts_data_set(words: Sequence[str]) -> bool:
    """Whether ``predict`` is asked for a data set: by an option, or by the folder of a run without images after it."""
    if any(word.partition("=")[0] in PREDICTS_DATA_SET for word in words):
        return True
    is_followed_by_images = len(words) > 1 and not words[1].startswith("-")
    return bool(words) and not is_followed_by_images and os.path.isdir(words[0])  # noqa: PTH112 (as above)


def announce(verb: str) -> None:
    """In a terminal, say that the command is at work before it imports torch, which may take long; on one rank."""
    ranks = [os.environ[name] for name in RANKS if name in os.environ]
    if sys.stderr.isatty() and all(rank == "0" for rank in ranks):
        print(f"syncbn {__version__} {verb}: loading", file=sys.stderr, flush=True)


def run_verb(verb: str, arguments: Sequence[str]) -> None:
    """Run one of a verb's functions, whose parameters are the options of the command."""
    from jsonargparse import auto_cli

    from syncbn.paths import ExpandingParser

    module = importlib.import_module(MODULES[verb])
    if hasattr(module, "run"):
        module.run(arguments)
        return
    auto_cli(
        module.COMMANDS, args=list(arguments), prog=f"syncbn {verb}", exit_on_error=False, parser_class=ExpandingParser
    )
