"""A checkout to submit from, and what the artefacts of a run in it say."""

import csv
import os
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from slurm import edited, words_after

REPOSITORY = Path(__file__).parents[2]

EPOCH = 40  # steps; a fault in the second of two finds a checkpoint of the first, and a run that is not yet over
STEPS = 2 * EPOCH
OPTIONS = {
    "--config": "configs/fashion_mnist.yaml",
    "--global_batch_size": "16",
    "--trainer.max_epochs": "2",
    "--trainer.limit_train_batches": str(EPOCH),
    "--trainer.limit_val_batches": "2",
    "--trainer.limit_test_batches": "4",
    "--trainer.log_every_n_steps": "1",
}
WORDS = [word for option in OPTIONS.items() for word in option]
"""Of syncbn fit: the recipe of the main job, on fewer and smaller batches."""


def timeout(seconds: float) -> list[str]:
    """The words that set how long a rank waits for the others."""
    return ["--trainer.strategy", "SynchronisedDDPStrategy", "--trainer.strategy.timeout_seconds", f"{seconds:g}"]


def checkout(folder: Path, edits: Mapping[str, Mapping[str, str | None]] | None = None) -> Path:
    """A checkout of the project, whose launch scripts differ from the project's in nothing but lines marked EDIT.

    Args:
        folder: Where to make it.
        edits: From the name of a script to what `slurm.edited` takes.
    """
    (folder / "launch").mkdir(parents=True)
    for script in (REPOSITORY / "launch").iterdir():
        if script.is_file():
            copy = folder / "launch" / script.name
            copy.write_text(edited(script, (edits or {}).get(script.name, {})))
            copy.chmod(script.stat().st_mode)
    (folder / "configs").symlink_to(REPOSITORY / "configs")
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def environment() -> dict[str, str]:
    """Variables of a command: this process's, and the package that is being tested."""
    paths = [str(REPOSITORY / "src"), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


def run_folders(folder: Path) -> list[Path]:
    """The folders of all runs in a checkout."""
    return sorted((folder / "runs" / "fashion_mnist").glob("version_*"))


def logged_steps(run: Path) -> list[int]:
    """The steps in a run's CSV log of which the loss was logged, in the order of the file."""
    with (run / "metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file) if row.get("train_loss")]


def steps_so_far(folder: Path) -> int:
    """The steps that the newest run has logged; 0 without a run."""
    runs = run_folders(folder)
    try:
        return len(logged_steps(runs[-1])) if runs else 0
    except FileNotFoundError:
        return 0


def final_weights(run: Path) -> dict[str, torch.Tensor]:
    """The weights and statistics of the last checkpoint, which has to be of the last step."""
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == STEPS
    return {name: value for name, value in checkpoint["state_dict"].items() if name.startswith("network.")}


def check_same_weights(run: Path, reference: Path) -> None:
    """Bitwise.

    Raises:
        AssertionError: Some differ; the message counts them.
    """
    found, expected = final_weights(run), final_weights(reference)
    assert found.keys() == expected.keys()
    different = [name for name, value in found.items() if not torch.equal(value, expected[name])]
    assert not different, f"{len(different)} of {len(found)} tensors differ, the first: {different[0]}"


def check_finished(folder: Path, log: str) -> Path:
    """That a checkout holds one run, with all its steps once, which a log ends with the result of.

    Returns:
        Its folder.

    Raises:
        AssertionError: It is not so.
    """
    runs = run_folders(folder)
    assert len(runs) == 1, f"{runs}\n{log}"
    assert logged_steps(runs[0]) == list(range(STEPS))
    assert float(words_after(r"test accuracy ([\d.]+) %", log)) >= 0
    assert words_after(r"\n(runs/fashion_mnist/version_0)\n", log)
    return runs[0]
