"""Checkpoint files: whole or not there, verified, and what a full disk does."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from syncbn.training.checkpoints.files import NEEDED, AtomicCheckpointIO, fault_of, newest_whole

WHOLE = dict.fromkeys(NEEDED, 0) | {"state_dict": {"weight": torch.arange(100_000.0)}}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small file system cannot be mounted: not root, or not allowed")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def save(folder: Path, step: int) -> Path:
    path = folder / f"step={step}.ckpt"
    AtomicCheckpointIO().save_checkpoint(WHOLE, path)
    return path


def test_what_is_written_can_be_read(tmp_path):
    path = save(tmp_path, 3)
    assert fault_of(path) == ""
    assert torch.equal(torch.load(path, weights_only=True)["state_dict"]["weight"], torch.arange(100_000.0))
    assert [file.name for file in tmp_path.iterdir()] == ["step=3.ckpt"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "another"])
def test_a_broken_newest_one_is_named_and_left_out(tmp_path, damage):
    good, bad = save(tmp_path, 9), save(tmp_path, 10)  # in order of the numbers, not of the letters
    content = bytearray(bad.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "another":
        torch.save({"state_dict": {}}, bad)
    else:
        bad.write_bytes({"cut": content[:-1000], "flipped": content, "emptied": b""}[damage])
    (tmp_path / ".step=11.ckpt.partial").write_bytes(b"left by a kill")
    said: list[str] = []
    assert newest_whole(tmp_path, said.append) == good
    assert len(said) == 1 and str(bad) in said[0] and "is broken and left out" in said[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step=10.broken", "step=9.ckpt"]
    assert newest_whole(tmp_path, said.append) == good and len(said) == 1


def test_a_kill_while_writing_leaves_the_previous_one(tmp_path):
    """The process dies by its own hand in the middle of the file."""
    save(tmp_path, 1)
    code = f"""
import os, signal, sys, torch
from pathlib import Path
from syncbn.training.checkpoints.files import AtomicCheckpointIO, atomic_file
path = Path({str(tmp_path)!r}, "step=1.ckpt")
with atomic_file(path) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=280)
    assert done.returncode == -9
    assert len(list(tmp_path.glob(".*.partial"))) == 1
    assert newest_whole(tmp_path, print) == tmp_path / "step=1.ckpt"
    assert [path.name for path in tmp_path.iterdir()] == ["step=1.ckpt"]


def test_a_full_disk_is_named_and_training_goes_on(small_disk, capfd):
    writer = AtomicCheckpointIO()
    writer.save_checkpoint(WHOLE, small_disk / "step=1.ckpt")
    filler = small_disk / "filler"
    filler.write_bytes(os.urandom(1_500_000))
    writer.save_checkpoint(WHOLE, small_disk / "step=2.ckpt")
    said = capfd.readouterr().err
    assert len(said.splitlines()) == 1
    assert f"the checkpoint {small_disk / 'step=2.ckpt'} could not be written: No space left on device" in said
    assert "MB are free there; make room); earlier checkpoints are kept; training goes on" in said
    assert sorted(path.name for path in small_disk.iterdir()) == ["filler", "step=1.ckpt"]
    writer.remove_checkpoint(small_disk / "step=1.ckpt")  # as Lightning does once the new one is there
    assert fault_of(small_disk / "step=1.ckpt") == ""
    filler.unlink()
    writer.save_checkpoint(WHOLE, small_disk / "step=3.ckpt")
    assert writer.failure == "" and fault_of(small_disk / "step=3.ckpt") == ""
    writer.remove_checkpoint(small_disk / "step=1.ckpt")
    assert sorted(path.name for path in small_disk.iterdir()) == ["step=3.ckpt"]


def test_the_first_one_has_to_be_writable(small_disk):
    (small_disk / "filler").write_bytes(os.urandom(1_900_000))
    with pytest.raises(ValueError, match=r"step=1\.ckpt could not be written: No space left on device"):
        AtomicCheckpointIO().save_checkpoint(WHOLE, small_disk / "step=1.ckpt")
