"""The ablations: what is tried, what is reported, and one real run of the command."""

import csv
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from syncbn.cli import main
from syncbn.experiments.ablations import all_trials, of_sections, run_name
from syncbn.experiments.ablations_report import Outcome, trains, write_report
from syncbn.experiments.recipe_runs import ValidationCurve

CONFIG = Path(__file__).parents[2] / "configs" / "ablations.yaml"
CONFIGURED = {"model.weight_decay": 5e-4, "model.learning_rate_per_32_images": 0.03}


def outcome(norm: str, rate: float, final: float, seed: int = 0, diverged: int | None = None) -> Outcome:
    changes = {"model.norm": norm, "model.learning_rate_per_32_images": rate}
    curve = ValidationCurve(np.array([5, 10]), np.array([0.9, final]), diverged)
    return Outcome("learning rate", f"{norm}, {rate:g}", changes, seed, curve)


def test_what_is_tried():
    trials = all_trials(CONFIGURED, [0.03, 0.3], in_shards=True)
    sections = [trial.section for trial in trials]
    assert {section: sections.count(section) for section in sections} == {
        "learning rate": 4,
        "dropout": 2,
        "L2": 3,
        "shuffling within shards": 2,
    }
    assert [t.changes["model.weight_decay"] for t in trials if t.section == "L2"] == pytest.approx([5e-4, 1e-4, 0])
    assert len(all_trials(CONFIGURED, [0.03, 0.3], in_shards=False)) == 9
    names = [run_name(trial, CONFIGURED) for trial in trials]
    assert names.count("as_configured") == 4  # with BN at the rate, no dropout, L2 and shuffling as they are
    assert len(set(names)) == 8 and "norm=none" in names and "shuffle_window=0" in names


def test_sections_can_be_chosen():
    trials = all_trials(CONFIGURED, [0.03, 0.3], in_shards=True)
    assert of_sections(trials, None) == trials
    chosen = of_sections(trials, ["L2", "shuffling within shards"])
    assert [trial.section for trial in chosen] == 3 * ["L2"] + 2 * ["shuffling within shards"]


def test_shuffling_is_tried_both_ways_whatever_the_recipe_says():
    for window in (0, 4, 16):
        trials = all_trials({"data.shuffle_window": window}, [0.03], in_shards=True)[-2:]
        assert [trial.changes["data.shuffle_window"] for trial in trials] == [window or 16, 0]


def test_what_trains():
    assert trains([outcome("batch", 1, 0.3), outcome("batch", 1, 0.2, seed=1)], num_classes=10)
    assert not trains([outcome("batch", 1, 0.9), outcome("batch", 1, 0.15, seed=1)], num_classes=10)
    assert not trains([outcome("batch", 1, 0.9), outcome("batch", 1, 0.9, 1, diverged=7)], num_classes=10)


def test_the_report(tmp_path):
    l2 = Outcome("L2", "none (0)", {}, 0, ValidationCurve(np.array([5, 10]), np.array([0.9, 0.91])))
    outcomes = [
        *(outcome("none", rate, final) for rate, final in ((0.01, 0.5), (0.1, 0.1))),
        outcome("none", 1.0, 0.1, diverged=3),
        *(outcome("none", 0.3, 0.5, seed=seed, diverged=seed or None) for seed in (0, 1)),
        *(outcome("batch", rate, final) for rate, final in ((0.01, 0.6), (0.1, 0.8), (0.3, 0.1), (1.0, 0.4))),
        l2,
    ]
    report = write_report(tmp_path, outcomes, {"data.root": "fashion-mnist"}, num_classes=10)
    assert "| learning rate | none, 0.3 | 25.00 % (0.00 to 50.00), 1 diverged |" in report
    assert "counts as 0 % in the means of the table and of the picture" in report
    assert "| learning rate | none, 1 | diverged |" in report and "| L2 | none (0) | 91.00 % |" in report
    criterion = "(at least twice the accuracy of guessing, with every seed)"
    assert f"Without BN these learning rates train {criterion}: 0.01." in report
    assert f"With BN these learning rates train {criterion}: 0.01, 0.1, 1." in report
    assert (tmp_path / "ablations.md").read_text() == report
    with (tmp_path / "ablations.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [row["final_top1"] for row in rows][:3] == ["0.5000", "0.1000", "0.0000"]
    assert rows[2]["diverged_after"] == "3" and rows[0]["best_top1"] == "0.9000"
    assert cv2.imread(str(tmp_path / "ablations.png")) is not None


@pytest.mark.parametrize("number", [1, 4, 7])
def test_the_report_is_written_after_each_training(tmp_path, number):
    """Also when the second seed, the other network and the other sections are still to come, or are not asked for."""
    both = [outcome("none", rate, 0.5, seed) for seed in (0, 1) for rate in (0.01, 0.1)]
    l2 = Outcome("L2", "none (0)", {}, 0, both[0].curve)
    outcomes = [*both[:3], outcome("batch", 0.1, 0.6), l2, l2, l2][:number]
    write_report(tmp_path, outcomes, {}, num_classes=10)
    wide = cv2.imread(str(tmp_path / "ablations.png")).shape[1]
    write_report(tmp_path, [l2], {}, num_classes=10)
    assert "learning rates train" not in (tmp_path / "ablations.md").read_text()
    assert cv2.imread(str(tmp_path / "ablations.png")).shape[1] == (wide if number < 5 else wide / 2)


def command(*words: str) -> None:
    main(["paper", "ablations", f"--recipe={CONFIG}", *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds=0"], "seeds=0 must be at least 1"),
        (["--learning_rates=[]"], "learning_rates=[] must be positive"),
        (["--learning_rates=[0.1, -1]"], "must be positive"),
        (["--recipe=nowhere.yaml"], "there is no nowhere.yaml"),
        (["--sections=[shuffling within shards]"], "there are: learning rate, dropout, L2"),
        (["--sections=[]"], "sections=[]: of these data"),
        (["--options=[--data.root]"], "'--data.root' must have the form --key=value"),
        (["--options=[--data.root=/no/such/folder]"], "no data at '/no/such/folder'"),
    ],
)
def test_mistakes_are_answered_in_one_line(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["syncbn"])
    with pytest.raises(SystemExit) as exited:
        command(*words)
    assert exited.value.code == 1
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def run_here(words: list[str], output: object, lock: object) -> int:
    """A training in this process: of five, the starts of their processes would take the longest."""
    main(words)
    return 0


@pytest.mark.usefixtures("own_folder")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_the_command_trains_and_reads_what_it_has_trained(tmp_path, monkeypatch):
    monkeypatch.setattr("syncbn.experiments.recipe_runs._run", run_here)
    quick = ["data.image_size=8", "trainer.limit_train_batches=2", "trainer.limit_val_batches=2"]
    options = ["trainer.log_every_n_steps=1", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false"]
    listed = ", ".join(f"--{option}" for option in [*quick, *options])
    words = ["--output=out", "--learning_rates=[0.03]", f"--options=[{listed}]"]
    command(*words)
    report = (tmp_path / "out" / "ablations.md").read_text()
    assert len([line for line in report.splitlines() if line.startswith("| ")]) == 2 + 7
    runs = tmp_path / "out" / "runs" / "seed_0"
    assert len([path for path in runs.iterdir() if (path / "finished").is_file()]) == 5
    logs = {path: path.stat().st_mtime_ns for path in runs.rglob("metrics.csv")}
    command(*words)
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("metrics.csv")} == logs
