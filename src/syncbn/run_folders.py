"""The folder of a run as an argument: its best checkpoint, and the config with its data."""

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
LAST = "last.ckpt"
SUMMARY = "summary.json"
BEST = "best_checkpoint"
"""Key of the summary: the path from the run folder."""


def is_run_folder(folder: Path) -> bool:
    """Whether a path is the folder of a run of `syncbn fit`."""
    return (folder / CONFIG).is_file() and (folder / CHECKPOINTS).is_dir()


def best_checkpoint(folder: Path) -> tuple[Path, str]:
    """The best checkpoint of a run, and what it is, in words; where none was kept as the best, the last one.

    Raises:
        ValueError: There is no checkpoint, or several may be the best.
    """
    summary = folder / SUMMARY
    noted = json.loads(summary.read_text()).get(BEST) if summary.is_file() else None
    if noted and (folder / noted).exists():
        return folder / noted, "the best checkpoint"
    candidates = sorted((folder / CHECKPOINTS).glob("best-*"))
    if len(candidates) == 1:
        return candidates[0], "the best checkpoint so far"
    if candidates:
        names = ", ".join(candidate.name for candidate in candidates)
        raise ValueError(f"{folder} does not say which of its checkpoints is the best: name one of {names}")
    last = folder / CHECKPOINTS / LAST
    if not last.exists():
        raise ValueError(f"{folder} is the folder of a run that has no checkpoint yet (best-*, {LAST})")
    return last, "the last checkpoint (none was kept as the best)"


def file_of_weights(weights: Path) -> Path:
    """A file of weights; of the folder of a run its best checkpoint, which is said."""
    if not is_run_folder(weights):
        return weights
    checkpoint, what = best_checkpoint(weights)
    print(f"syncbn: takes {checkpoint}, {what} of the run", file=sys.stderr, flush=True)
    return checkpoint


def expand_run_folder(words: Sequence[str], speaks: bool = True) -> list[str]:
    """Replace the folder of a run, given after the verb, by its config and its best checkpoint.

    Args:
        words: After ``syncbn``.
        speaks: Whether to say what is taken.

    Raises:
        ValueError: The word after the verb is no option and no such folder.
    """
    if len(words) < 2 or any(word.startswith("-") for word in words[:2]):
        return list(words)
    verb, name, *rest = words
    folder = Path(name).expanduser()
    if not is_run_folder(folder):
        raise ValueError(
            f"syncbn {verb} {name}: this is no folder of a run, with {CONFIG} and {CHECKPOINTS}/ in it; name one, or"
            " give --config and --ckpt_path"
        )
    config = ["--config", os.fspath(folder / CONFIG)]
    if any(word.partition("=")[0] in ("--ckpt_path", "--checkpoints") for word in rest):
        return [verb, *config, *rest]
    checkpoint, what = best_checkpoint(folder)
    if speaks:
        print(f"syncbn: takes {checkpoint}, {what} of the run, and the data of {CONFIG}", file=sys.stderr, flush=True)
    return [verb, *config, "--ckpt_path", os.fspath(checkpoint), *rest]
