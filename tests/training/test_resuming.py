"""Which folder a restart goes on in, from where, and with which config it may."""

import json
import os
import time
from pathlib import Path

import pytest
import torch
import yaml

from run_results import learned
from syncbn.cli import main
from syncbn.training.checkpoints.files import AtomicCheckpointIO
from syncbn.training.checkpoints.resuming import (
    RestartedJob,
    ResumePoint,
    check_config,
    find_resume_point,
    point_of_restart,
    record_end,
    record_start,
)
from training.test_checkpoint_files import WHOLE

pytestmark = [
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
]

WORDS = ["fit", "--config", "a.yaml"]
WORDS_OF_A_RUN = [
    *("fit", "--name=run", "--data.image_size=8", "--data.validation_images=9950", "--global_batch_size=8"),
    *("--model.stem=small", "--model.width_multiplier=0.125", "--test_after_fit=false"),
    *("--trainer.max_epochs=2", "--trainer.devices=1", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1"),
    *("--trainer.limit_val_batches=1", "--trainer.enable_progress_bar=false"),
]


def torchrun(folder: str, attempt: int, run_id: str = "none") -> dict[str, str]:
    """The environment that torchrun gives its processes."""
    return {
        "TORCHELASTIC_ERROR_FILE": f"/tmp/torchelastic_{folder}/{run_id}_{folder}/attempt_{attempt}/0/error.json",
        "TORCHELASTIC_RUN_ID": run_id,
        "TORCHELASTIC_RESTART_COUNT": str(attempt),
    }


def slurm(job: str, restarts: int) -> dict[str, str]:
    """The environment that SLURM gives; the count is unset in the first start."""
    return {"SLURM_JOB_ID": job} | ({"SLURM_RESTART_COUNT": str(restarts)} if restarts else {})


def begin(parent: Path, number: int, environment: dict[str, str], words: list[str] = WORDS) -> Path:
    """A run folder as a start leaves it behind."""
    folder = parent / f"version_{number}"
    (folder / "checkpoints").mkdir(parents=True)
    record_start(folder, RestartedJob.from_environment(environment, words), None)
    return folder


def found(parent: Path, environment: dict[str, str], monkeypatch, words: list[str] = WORDS) -> Path | None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    point = point_of_restart(parent, RestartedJob.from_environment(environment, words))
    for name in environment:
        monkeypatch.delenv(name)
    return point.folder if point else None


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (torchrun("a", 0), torchrun("a", 1)),
        (slurm("7", 0), slurm("7", 1)),
        (slurm("7", 0) | torchrun("a", 0), slurm("7", 1) | torchrun("b", 0)),  # requeued: another torchrun
        (torchrun("a", 0), torchrun("a", 0)),  # ranks that were added or lost do not count as a restart
    ],
)
def test_a_restart_finds_its_folder_among_others(tmp_path, monkeypatch, first, second):
    begin(tmp_path, 0, torchrun("x", 0) | slurm("6", 0))
    mine = begin(tmp_path, 1, first)
    begin(tmp_path, 2, first, ["fit", "--config", "b.yaml"])
    begin(tmp_path, 3, torchrun("y", 0) | slurm("8", 0))
    assert found(tmp_path, second, monkeypatch) == mine


def test_a_run_id_is_of_this_torchrun_only(tmp_path, monkeypatch):
    """The launch scripts' is the same every day."""
    first = begin(tmp_path / "runs", 0, torchrun("a", 0, "mine"))
    began = tmp_path / "mine_b" / "attempt_0"  # another node's torchrun, of the same rendezvous
    began.mkdir(parents=True)
    second = torchrun("b", 1, "mine") | {"TORCHELASTIC_ERROR_FILE": str(tmp_path / "mine_b/attempt_1/0/error.json")}
    assert found(tmp_path / "runs", second, monkeypatch) == first
    for seconds, expected in ((50, first), (70, None)):
        later = time.time() + seconds
        for folder in (began, tmp_path):
            os.utime(folder, (later, later))
        assert found(tmp_path / "runs", second, monkeypatch) == expected
    os.utime(began, (0, 0))
    assert found(tmp_path / "runs", second, monkeypatch) == first
    record_end(first, 9)
    assert found(tmp_path / "runs", second, monkeypatch) is None
    assert found(tmp_path / "runs", torchrun("a", 1, "mine"), monkeypatch) == first


@pytest.mark.parametrize("environment", [{}, slurm("7", 0), torchrun("b", 0, "mine"), torchrun("b", 1), slurm("9", 1)])
def test_what_is_no_restart_of_it_begins_anew(tmp_path, monkeypatch, environment):
    begin(tmp_path, 0, slurm("7", 0) | torchrun("a", 0, "mine"))
    assert found(tmp_path, environment, monkeypatch) is None


def test_the_newest_whole_checkpoint_or_the_end(tmp_path):
    folder = begin(tmp_path, 0, {})
    assert find_resume_point(folder) == ResumePoint(folder, None, 0)
    for name in ("step=9", "step=10", "last"):
        AtomicCheckpointIO().save_checkpoint(WHOLE | {"global_step": 12}, folder / "checkpoints" / f"{name}.ckpt")
    assert find_resume_point(folder) == ResumePoint(folder, folder / "checkpoints" / "step=10.ckpt", 10)
    record_end(folder, 12)
    assert find_resume_point(folder) == ResumePoint(folder, folder / "checkpoints" / "last.ckpt", 12)
    with (folder / "starts.jsonl").open("a") as lines:
        lines.write('{"time": "2026')  # a kill in the middle of a line
    assert find_resume_point(folder).step == 12


@pytest.mark.parametrize(("fault", "named"), [("damaged", "the checksum of"), ("older", "it is of step 6, not 12")])
def test_a_finished_run_without_its_last_state_goes_on_before_it(tmp_path, capsys, fault, named):
    checkpoints = begin(tmp_path, 0, {}) / "checkpoints"
    last, newest = checkpoints / "last.ckpt", checkpoints / "step=10.ckpt"
    AtomicCheckpointIO().save_checkpoint(WHOLE, newest)
    AtomicCheckpointIO().save_checkpoint(WHOLE | {"global_step": 6 if fault == "older" else 12}, last)
    record_end(checkpoints.parent, 12)
    if fault == "damaged":
        content = bytearray(last.read_bytes())
        content[len(content) // 2] ^= 1
        last.write_bytes(content)
    assert find_resume_point(checkpoints.parent) == ResumePoint(checkpoints.parent, newest, 10)
    assert f"syncbn: {last} is left out ({named}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"model": {"dropout": 0.5}}, "model.dropout=0.5, but the run .* began with 0.0"),
        ({"global_batch_size": 64}, "global_batch_size=64, but the run .* began with 32"),
        ({"trainer": {"precision": "bf16-mixed"}}, "trainer.precision=bf16-mixed, but"),
        ({"data": {"seed": 1}}, "data.seed=1, but the run .* began with 0"),
        ({"trainer": {"max_epochs": 9, "devices": 4}}, None),
        ({"data": {"num_workers": 4, "root": "elsewhere"}}, None),
        ({"name": "other", "checkpointing": {"keep_last": 9}}, None),
    ],
)
def test_what_the_numbers_depend_on_must_not_change(tmp_path, change, named):
    config = {"global_batch_size": 32, "model": {"dropout": 0.0}, "data": {"seed": 0}, "trainer": {"precision": None}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    changed = {
        key: (config.get(key) or {}) | value if isinstance(value, dict) else value for key, value in change.items()
    }
    if named is None:
        check_config(tmp_path, config | changed)
        return
    with pytest.raises(ValueError, match=named):
        check_config(tmp_path, config | changed)


def fails(capsys, *words: str) -> str:
    with pytest.raises(SystemExit) as exited:
        main(list(words))
    assert exited.value.code == 1
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.usefixtures("own_folder")
@pytest.mark.parametrize("precision", ["32-true", "64-true"])
def test_a_run_is_gone_on_with_by_hand_and_by_a_restart(tmp_path, monkeypatch, capsys, precision):
    """By the command line, in one process: half a run, then the rest of it, is the whole run."""
    words = [*WORDS_OF_A_RUN, f"--trainer.precision={precision}"]
    main([*words, "--runs_folder=whole"])
    for name, value in slurm("7", 0).items():
        monkeypatch.setenv(name, value)
    main([*words, "--checkpointing.every_n_steps=4"])
    run = tmp_path / "runs" / "run" / "version_0"
    log = learned(run)
    assert learned(tmp_path / "whole" / "run" / "version_0") == log
    weights = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert json.loads((run / "starts.jsonl").read_text().splitlines()[-1])["finished"] == 12
    (run / "starts.jsonl").write_text((run / "starts.jsonl").read_text().splitlines()[0] + "\n")  # as if killed before
    (run / "checkpoints" / "last.ckpt").unlink()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    main([*words, "--checkpointing.every_n_steps=4"])
    assert f"goes on in {Path('runs/run/version_0')} from" in capsys.readouterr().err
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]
    again = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert learned(run) == log
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    by_hand = [*words, f"--resume={run}", "--trainer.max_epochs=3", "--runs_folder=other"]
    main(by_hand)
    summary = json.loads((run / "summary.json").read_text())
    main(by_hand)  # trains nothing: what was measured stays
    again = json.loads((run / "summary.json").read_text())
    assert again == summary | {"ended_early": "there was nothing left to train"} and again["images_per_second"] > 0
    assert learned(run)[: len(log)] == log and not Path("other").exists()
    assert "model.dropout=0.5, but the run" in fails(capsys, *by_hand, "--model.dropout=0.5")
    assert "--resume nowhere is no run folder" in fails(capsys, *words, "--resume=nowhere")
    assert os.environ.get("SYNCBN_GO_ON_FROM") is None
