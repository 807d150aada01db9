"""``syncbn paper figure2``: the table against numbers worked out by hand, and the command itself on noise."""

import csv
import json
import shutil
import sys
import time
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
import pytest

from shard_cases import make_shards
from syncbn.cli import main
from syncbn.experiments.figure2 import figure2
from syncbn.experiments.figure2_models import MODELS, NEGATIVES
from syncbn.experiments.figure2_report import Result, compare, write_report
from syncbn.experiments.recipe_runs import ValidationCurve, claimed_folder, validation_curve
from syncbn.experiments.scale import Scale

SMALL = Scale(0.125, 64, 10, 2500, 32)
CONFIGS = Path(__file__).parents[2] / "configs" / "imagenet"


def curve(*points: float, diverged_after: int | None = None) -> ValidationCurve:
    """Accuracies after 10, 20, ... steps."""
    return ValidationCurve(10 * np.arange(1, len(points) + 1), np.array(points), diverged_after)


def results() -> list[Result]:
    """Two seeds: BN-x5 matches after 20 and 10 of 40 steps, BN-x30 with the second seed only, the sigmoid never."""
    inception, _, x5, x30, sigmoid = MODELS
    first = [(inception, curve(0.1, 0.3, 0.2, 0.5)), (x5, curve(0.4, 0.5, 0.6, 0.6)), (x30, curve(0.1, 0.2, 0.3, 0.49))]
    first += [(sigmoid, curve(0.1, 0.2, 0.2, 0.2)), (NEGATIVES[0], curve(0.1, 0.1, diverged_after=7))]
    second = [(inception, curve(0.1, 0.2, 0.3, 0.4)), (x5, curve(0.5, 0.5, 0.6, 0.8)), (x30, curve(0.1, 0.1, 0.5, 0.7))]
    return [Result(model, 0, found) for model, found in first] + [Result(model, 1, found) for model, found in second]


def test_steps_to_match_and_ratios_by_hand():
    found = [(row.result.model.name, row.result.seed, row.steps_to_match, row.ratio) for row in compare(results())]
    assert found == [
        ("inception", 0, 40, 1.0),
        ("bn_x5", 0, 20, 2.0),
        ("bn_x30", 0, None, None),
        ("bn_x5_sigmoid", 0, None, None),
        ("inception_x5", 0, None, None),
        ("inception", 1, 40, 1.0),
        ("bn_x5", 1, 10, 4.0),
        ("bn_x30", 1, 30, pytest.approx(4 / 3)),
    ]


def test_a_curve_counts_the_first_evaluation_that_is_as_good():
    assert curve(0.1, 0.6, 0.4, 0.6).steps_to(0.6) == 20
    assert curve(0.1, 0.6, 0.4).steps_to(0.7) is None
    assert curve().best is None and curve().steps_to(0.1) is None


def test_the_report_says_what_is_in_the_table(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["syncbn", "paper", "figure2", "some data"])
    (tmp_path / "notes.md").touch()
    settings = {"options": ["--data.root=x"], "learning_rate_per_32_images": 0.01}
    timed = [replace(result, seconds=90.0) if result.seed else result for result in results()]
    report = write_report(tmp_path, timed, 32, settings, SMALL)
    lines = report.splitlines()
    assert "    syncbn paper figure2 'some data'" in lines and "Seeds: 0, 1." in lines
    assert "| BN-x5 | 15 (10 to 20) | 3.0 (2.0 to 4.0) | 2.1 M | 14.8 | 70.0 % (60.0 % to 80.0 %) | 73.0 % |" in lines
    x30 = next(line for line in lines if line.startswith("| BN-x30"))
    assert "| 30 (30 to 30); not reached by 1 of 2 seeds |" in x30 or "| 30; not reached by 1 of 2 seeds |" in x30
    assert x30.split("|")[5].strip() == "11.5"
    assert "| BN-x5-Sigmoid | not reached | - | - | - | 20.0 % | 69.8 % |" in lines
    assert lines[-1].endswith("not finite after 7 steps.")
    scale = "0.125 of the width, 64 px, 10 classes, 2,500 steps of 32 images: not the paper's scale"
    assert f"Trained here: {scale}. What follows from that: [notes](notes.md)." in lines
    assert "Inception, seed 1: 1.5; BN-x5, seed 1: 1.5; BN-x30, seed 1: 1.5." in report and "seed 0: 1" not in report
    with (tmp_path / "figure2.csv").open(newline="") as points:
        rows = list(csv.DictReader(points))
    assert len(rows) == 4 * 4 + 2 + 3 * 4
    assert rows[1] == {"model": "inception", "seed": "0", "steps": "20", "images": "640", "top1": "0.3"}
    with (tmp_path / "table.csv").open(newline="") as table:
        assert [row["steps_to_match"] for row in csv.DictReader(table)] == ["40", "20", "", "", "", "40", "10", "30"]
    assert cv2.imread(str(tmp_path / "figure2.png")).std() > 10


def write_log(folder: Path, version: int, text: str) -> None:
    (folder / f"version_{version}").mkdir(parents=True)
    (folder / f"version_{version}" / "metrics.csv").write_text("step,train_loss,val_top1\n" + text)


def test_the_curve_of_an_interrupted_run_is_put_together(tmp_path):
    write_log(tmp_path, 0, "0,2.0,\n1,,0.25\n3,,0.5\n5,,0.1\n")  # killed after step 6, resumed after step 4
    write_log(tmp_path, 1, "4,2.0,\n5,,0.75\n7,,0.5\n")
    found = validation_curve(tmp_path)
    assert found.steps.tolist() == [2, 4, 6, 8] and found.top1.tolist() == [0.25, 0.5, 0.75, 0.5]
    assert found.diverged_after is None
    (tmp_path / "finished").write_text("the loss is not finite in step 8 at the learning rate 3; ...")
    assert validation_curve(tmp_path).diverged_after == 8


def test_a_reference_that_diverged_is_matched_by_none(tmp_path):
    inception, _, x5, *_ = MODELS
    found = [Result(inception, 0, curve(diverged_after=7)), Result(x5, 0, curve(0.2, 0.5))]
    assert [(row.steps_to_match, row.ratio) for row in compare(found)] == [(None, None)] * 2
    report = write_report(tmp_path, found, 32, {"options": []}, SMALL)
    assert (
        "| Inception | not evaluated; diverged with 1 of 1 seeds | - | 31.0 M | 1.0 | not evaluated | 72.2 % |"
        in report
    )
    with (tmp_path / "table.csv").open(newline="") as table:
        assert [row["best_top1"] for row in csv.DictReader(table)] == ["", "0.5"]


@pytest.mark.parametrize(
    ("scale", "ends"),
    [
        (Scale(1, 224, 1000), "full width, 224 px, 1,000 classes: the paper's scale"),
        (Scale(1, 224, 1000, 6_000_000, 32), "6,000,000 steps of 32 images: the paper's scale"),
        (Scale(1, 224, 1000, 2500), "2,500 steps: not the paper's scale"),
        (Scale(1, 224, 100), "100 classes: not the paper's scale"),
    ],
)
def test_only_what_the_paper_trained_is_its_scale(scale, ends):
    assert str(scale).endswith(ends)


def claim(folder: Path, rate: float) -> None:
    with claimed_folder(folder, {"rate": rate, "options": ["a"]}):
        pass


def test_runs_with_other_settings_or_of_another_command_are_refused(tmp_path):
    with claimed_folder(tmp_path, {"rate": 1.0, "options": ["a"]}), pytest.raises(ValueError, match="is in use"):
        claim(tmp_path, 1.0)
    claim(tmp_path, 1.0)
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "runs"):
        with pytest.raises(ValueError, match=rf"^{folder} cannot be made, since a file is in its place"):
            claim(folder, 1.0)
    with pytest.raises(ValueError, match=r"holds runs with rate=1\.0, and this is rate=2\.0"):
        claim(tmp_path, 2.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": 0}, "images=0 must be at least 1"),
        ({"seeds": 0}, "seeds=0 must be at least 1"),
        ({"models": ["bn_x5"]}, "the first must be inception"),
        ({"models": ["inception", "bn_x6"]}, "the rest of bn_baseline, bn_x5, bn_x30, bn_x5_sigmoid, inception_x5"),
        ({"configs": Path("nowhere")}, "there is no nowhere/inception.yaml"),
        (
            {"images": 640, "evaluate_every": 672},
            r"images=640 \(20 steps\) end before .*evaluate_every=672 \(21 steps\)",
        ),
        ({"images": 640}, r"images=640 \(20 steps\) end before .* an epoch of 10000 images \(312 steps\)"),
    ],
)
def test_bad_arguments(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        figure2("fashion-mnist", **({"output": tmp_path, "configs": CONFIGS} | arguments))


def test_every_model_trains_by_its_recipe_at_the_papers_ratios(tmp_path, monkeypatch, capsys):
    trained: dict[str, dict[str, str]] = {}

    def keep(runs_folder: Path, name: str, options: list[str], lock: object) -> Path:
        trained[name] = dict(option.removeprefix("--").split("=", 1) for option in options)
        return runs_folder / name

    monkeypatch.setattr("syncbn.experiments.figure2.train", keep)
    given = {"images": 6400, "evaluate_every": 640, "image_size": 64, "learning_rate": 0.01, "decay_every": 6000}
    figure2("fashion-mnist", tmp_path, CONFIGS, **given, options=["--trainer.devices=2"])
    rate, decay = "model.learning_rate_per_32_images", "model.decay_every"
    rates = {name: float(options[rate]) for name, options in trained.items()}
    one, five, thirty = 0.01, 0.05, 0.3
    assert rates == pytest.approx(
        {"inception": one, "bn_baseline": one, "bn_x5": five, "bn_x30": thirty, "bn_x5_sigmoid": five}
        | {"inception_x5": five, "inception_sigmoid": one}
    )
    decays = {name: float(options[decay]) for name, options in trained.items()}
    assert decays == pytest.approx({name: 1000 if name.startswith("bn_x") else 6000 for name in trained}, rel=1e-6)
    recipes = {name: Path(options["config"]).stem for name, options in trained.items()}
    assert recipes == {model.name: model.recipe for model in (*MODELS, *NEGATIVES)}
    own = {rate, decay, "config", "model.activation"}
    shared = [{key: value for key, value in options.items() if key not in own} for options in trained.values()]
    assert all(options == shared[0] for options in shared)
    assert shared[0]["trainer.max_steps"] == "200" and shared[0]["trainer.val_check_interval"] == "20"
    assert trained["inception_sigmoid"]["model.activation"] == "sigmoid"
    assert "Trained here: full width, 64 px, 10 classes, 200 steps of 32 images: not" in capsys.readouterr().out
    other = shutil.copytree(CONFIGS, tmp_path / "configs")
    recipe = other / "bn_x30.yaml"
    recipe.write_text(recipe.read_text().replace("momentum: 0.9 ", "momentum: 0.8 "))
    with pytest.raises(ValueError, match=r"runs with bn_x30.model.momentum=0.9, and this is bn_x30.model.momentum=0.8"):
        figure2("fashion-mnist", tmp_path, other, **given, options=["--trainer.devices=2"])


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """The command for sixteen steps of each model on 48 images of noise."""
    shards = make_shards(tmp_path_factory.mktemp("shards"), train=(24, 24), val=(8,))
    options = ["--trainer.devices=1", "--trainer.accelerator=cpu", "--data.num_workers=0"]
    options += ["--trainer.enable_progress_bar=false", "--trainer.log_every_n_steps=1"]
    words = [str(shards), f"--configs={CONFIGS}", "--global_batch_size=16", "--images=256", "--evaluate_every=32"]
    words += ["--image_size=32", "--width_multiplier=0.125", "--learning_rate=0.003", "--decay_every=960"]
    return ["paper", "figure2", *words, f"--options={json.dumps(options)}"]


def test_a_killed_command_goes_on_where_it_was(words, tmp_path, monkeypatch, capsys):
    run = tmp_path / "runs" / "seed_0"
    words = [*words, f"--output={tmp_path}", "--models=[inception, bn_x5]", "--evaluate_every=256"]
    words.append("--options+=--checkpointing.every_n_steps=1")
    write_log(run / "inception", 0, "15,,0.25\n")
    (run / "inception" / "finished").touch()
    process = get_context("forkserver").Process(target=main, args=(words,))
    process.start()
    begun = run / "bn_x5" / "version_0"
    while not list(begun.glob("checkpoints/step=*.ckpt")):
        assert process.is_alive()
        time.sleep(0.02)
    process.terminate()
    process.join()
    assert not (run / "bn_x5" / "finished").is_file() and not (begun / "checkpoints" / "last.ckpt").is_file()
    monkeypatch.setattr(sys, "argv", ["syncbn"])
    main(words)
    assert "| BN-x5 |" in capsys.readouterr().out and (tmp_path / "figure2.png").is_file()
    assert sorted(path.name for path in (run / "inception").iterdir()) == ["finished", "version_0"]
    assert list((run / "bn_x5").glob("version_*")) == [begun]
    went_on = [json.loads(line).get("from") for line in (begun / "starts.jsonl").read_text().splitlines()]
    assert went_on[0] is None and went_on[1].startswith("step=")
    assert len((run / "bn_x5" / "seconds").read_text().split()) == 2
    for name in ("inception", "bn_x5"):
        assert validation_curve(run / name).steps.tolist() == [16], name


def test_a_training_that_fails_is_named(words, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["syncbn"])
    with pytest.raises(SystemExit):
        main([*words, f"--output={tmp_path}", "--global_batch_size=100"])
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("syncbn: error: the training inception stopped: global_batch_size=100 exceeds the 48")
    assert line.endswith("fit.log)")
