"""Run folders, provenance and the picture of the curves."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import distribution

import cv2
import pytest

from syncbn.training.run import folder as runs
from syncbn.training.run.curves import plot_curves, read_series
from syncbn.training.run.folder import claim_run_folder, git_revision, hold_run_folder, source_revision


def test_every_run_gets_a_folder_of_its_own(tmp_path):
    with ThreadPoolExecutor(8) as threads:
        claimed = list(threads.map(lambda _: claim_run_folder(tmp_path / "name"), range(16)))
    assert {folder.name for folder in claimed} == {f"version_{number}" for number in range(16)}
    assert len(list((tmp_path / "name").iterdir())) == 16


def test_a_run_folder_is_held_by_one_process_until_it_ends(tmp_path):
    code = (
        "import sys, pathlib; from syncbn.training.run.folder import hold_run_folder as hold; "
        "hold(pathlib.Path(sys.argv[1]))"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{code}; print(flush=True); input()", str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline()
    with pytest.raises(ValueError, match=f"^process {holder.pid} on .* is training in {tmp_path}: wait for its end"):
        hold_run_folder(tmp_path)
    hold_run_folder(tmp_path, is_restart=True)
    holder.kill()
    holder.communicate()
    hold_run_folder(tmp_path)
    hold_run_folder(tmp_path)


def test_git_revision(monkeypatch, tmp_path):
    assert git_revision(tmp_path) == "unknown"

    def git(*words: str) -> str:
        command = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout.strip()

    git("init")
    assert git_revision(tmp_path) == "unknown"
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    assert git_revision(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("2")
    assert git_revision(tmp_path) == git("rev-parse", "HEAD") + "-dirty"

    # A package that is only installed there has another revision.
    package = tmp_path / ".venv" / "syncbn"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    assert source_revision(package) == "unknown"
    monkeypatch.setattr(runs, "distribution", lambda name: distribution("no-such-package"))
    assert source_revision(package) == "unknown", "nor need it be installed at all"
    git("add", "--force", ".venv")
    git("commit", "-m", "second")
    assert source_revision(package) == git("rev-parse", "HEAD") + "-dirty"


@pytest.mark.parametrize("rows", ["", "9,,0.5,,\n", "9,0.1,0.5,,\n19,0.05,0.25,,\n19,,,0.4,0.9\n"])
def test_curves_are_drawn_from_however_short_a_log(tmp_path, rows):
    log = tmp_path / "metrics.csv"
    log.write_text("step,learning_rate,train_loss,val_loss,val_top1\n" + rows)
    plot_curves(log, tmp_path / "curves.png")
    assert cv2.imread(str(tmp_path / "curves.png")).shape == (1200, 960, 3)


def test_a_column_is_read_where_it_has_values(tmp_path):
    log = tmp_path / "metrics.csv"
    log.write_text("step,a,b\n1,0.5,\n2,,7\n3,0.25,8\n")
    assert read_series(log, "a") == ([1, 3], [0.5, 0.25])
    assert read_series(log, "missing") == ([], [])
