"""The folder of a run in place of a config and a checkpoint."""

import json

import pytest

from syncbn.run_folders import best_checkpoint, expand_run_folder, file_of_weights


@pytest.fixture
def run(tmp_path):
    """The folder of a run that has ended its first epoch."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").touch()
    (tmp_path / "checkpoints" / "last.ckpt").touch()
    return tmp_path


def test_the_best_is_what_the_summary_names_or_the_only_one_or_the_last(run):
    folder = run / "checkpoints"
    assert best_checkpoint(run)[0] == folder / "last.ckpt" and "none was kept" in best_checkpoint(run)[1]
    (folder / "best-1.ckpt").touch()
    assert best_checkpoint(run)[0] == folder / "best-1.ckpt"
    (folder / "best-2.ckpt").touch()
    with pytest.raises(ValueError, match=r"which of its checkpoints is the best: name one of best-1.ckpt, best-2.ckpt"):
        best_checkpoint(run)
    (run / "summary.json").write_text(json.dumps({"best_checkpoint": "checkpoints/best-1.ckpt"}))
    assert best_checkpoint(run)[0] == file_of_weights(run) == folder / "best-1.ckpt"
    (folder / "best-1.ckpt").unlink()
    assert best_checkpoint(run)[0] == folder / "best-2.ckpt"
    for path in folder.iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        best_checkpoint(run)


def test_words(run, capsys):
    config, last = ["--config", f"{run}/config.yaml"], f"{run}/checkpoints/last.ckpt"
    assert expand_run_folder(["test", str(run), "--x=1"]) == ["test", *config, "--ckpt_path", last, "--x=1"]
    assert f"takes {last}, the last checkpoint" in capsys.readouterr().err
    assert expand_run_folder(["test", str(run), "--ckpt_path=x"]) == ["test", *config, "--ckpt_path=x"]
    assert expand_run_folder(["test", "--x"]) == ["test", "--x"] and file_of_weights(run / "x.ckpt") == run / "x.ckpt"
    with pytest.raises(ValueError, match=r"syncbn test nowhere: this is no folder of a run"):
        expand_run_folder(["test", "nowhere"])
