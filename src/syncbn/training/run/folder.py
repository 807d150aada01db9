"""The folder of a run, and what is written into it besides logs and checkpoints."""

import fcntl
import json
import os
import socket
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser, Namespace, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

from syncbn.files import atomic_file
from syncbn.run_folders import CONFIG


def claim_run_folder(parent: Path) -> Path:
    """Create the first free ``parent/version_N``, and return it.

    Creating a folder is atomic: of two runs started at once, each gets its own.
    """
    parent.mkdir(parents=True, exist_ok=True)
    number = 0
    while True:
        folder = parent / f"version_{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


_held: set[Path] = set()
"""Files by which this process holds run folders. They stay open: the locks end with it, however it ends."""


def hold_run_folder(folder: Path, is_restart: bool = False) -> None:
    """Keep other processes from training in a run folder as long as this one lives.

    Args:
        folder: Exists. Where its file system has no locks, nothing is done.
        is_restart: Whether a launcher started this process in the place of one that it knows to be dead. A file system
            may hold the lock of a machine that failed for minutes: it is not looked at.

    Raises:
        ValueError: Another process holds it.
    """
    file = folder.resolve() / "lock"
    if file in _held:
        return
    lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        # Not flock, whose lock the workers of the data inherit: of a process that was killed, they live on a while.
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.read(lock, 200).decode(errors="replace").strip() or "another process"
        os.close(lock)
        if is_restart or not isinstance(error, (BlockingIOError, PermissionError)):
            return
        raise ValueError(
            f"{holder} is training in {folder}: wait for its end or stop it, or start a run of its own (no --resume)"
        ) from error
    os.ftruncate(lock, 0)
    os.write(lock, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    _held.add(file)


def git_revision(folder: Path) -> str:
    """Revision of the git checkout that ``folder`` lies in, with "-dirty" if it was changed; or "unknown"."""
    try:
        described = subprocess.run(
            ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return described.stdout.strip() or "unknown"


def source_revision(package: Path = Path(__file__).parents[2]) -> str:
    """Revision of this package's code: of the git checkout that it lies in, or was installed from; or "unknown"."""
    # Installed into the checkout of something else, it is not that one's.
    tracked = ["git", "-C", str(package), "ls-files", "--error-unmatch", "__init__.py"]
    with suppress(OSError, subprocess.SubprocessError):
        subprocess.run(tracked, capture_output=True, timeout=10, check=True)
        return git_revision(package)
    try:
        origin = json.loads(distribution("syncbn").read_text("direct_url.json") or "{}")  # PEP 610: pip install git+...
    except PackageNotFoundError:  # on PYTHONPATH, where git did not answer
        return "unknown"
    return origin.get("vcs_info", {}).get("commit_id", "unknown")


def run_folder(trainer: Trainer) -> Path | None:
    """The folder of the run, or None where the trainer writes no CSV log.

    Unlike ``trainer.log_dir`` this sends no message, so that rank 0 may ask alone; on other ranks it means
    nothing.
    """
    return next((Path(logger.log_dir) for logger in trainer.loggers if isinstance(logger, CSVLogger)), None)


def describe_run(trainer: Trainer) -> dict[str, Any]:
    """The code, the libraries, the command and the size of a run."""
    return {
        "command": sys.argv,
        "git_revision": git_revision(Path.cwd()),
        "syncbn_git_revision": source_revision(),
        "versions": {name: version(name) for name in ("syncbn", "torch", "lightning")},
        "ranks": trainer.world_size,
        "device": str(trainer.strategy.root_device),
    }


class RunRecord(Callback):
    """Writes ``provenance.yaml`` into the run folder: the code, the libraries and the command of the run."""

    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the file."""
        folder = run_folder(trainer)
        if folder is None:
            return
        (folder / "provenance.yaml").write_text(yaml.safe_dump(describe_run(trainer), sort_keys=False))


class KeptConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the run folder when the run begins; a run that goes on keeps it."""

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write, on rank 0."""
        folder = run_folder(trainer)
        if folder and not (folder / CONFIG).is_file():
            with atomic_file(folder / CONFIG) as file:
                file.write(dump_config(self.parser, self.config).encode())


def dump_config(parser: LightningArgumentParser, config: Namespace) -> str:
    """The config of a run as YAML, without what is of one start alone: ``syncbn test`` takes it, too."""
    of_run = config.clone()
    of_run.pop("resume", None)
    return parser.dump(of_run, skip_none=False)
