"""Figure 1: the network, its training on one rank and on several, resuming, and what the command writes."""

import csv
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import syncbn
from syncbn.cli import main
from syncbn.data.loading.order import epoch_order
from syncbn.experiments import sigmoid_network as module
from syncbn.experiments.figure1_plot import _lowest_accuracy
from syncbn.experiments.figure1_report import typical_unit, unsteadiness
from syncbn.experiments.recipe_runs import claimed_folder
from syncbn.experiments.sigmoid_network import Curves, Run, Training, load_digits, sigmoid_network

MNIST = Path(os.environ.get("SYNCBN_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "mnist"
RUN = Run(True, 0.5, 0.1, 3, 1, steps=40, batch_size=30, evaluate_every=10, precision="float64")


def write_idx(path: Path, values: np.ndarray) -> None:
    shape = np.array(values.shape, ">u4").tobytes()
    path.write_bytes(bytes([0, 0, 8, values.ndim]) + shape + values.astype(np.uint8).tobytes())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """300 training and 50 test images of 6x6 pixels: class k has k bright rows of pixels, among noise."""
    folder = tmp_path_factory.mktemp("digits")
    random = np.random.default_rng(0)
    for split, count in (("train", 300), ("t10k", 50)):
        labels = random.permutation(count) % 10
        bright = np.arange(36) < 3.6 * labels[:, None]
        images = np.where(bright ^ (random.random((count, 36)) < 0.1), 200, 100).reshape(count, 6, 6)
        write_idx(folder / f"{split}-images-idx3-ubyte", images)
        write_idx(folder / f"{split}-labels-idx1-ubyte", labels)
    return folder


@pytest.fixture(scope="module")
def digits(folder):
    return load_digits(folder, 127)


def curves(run: Run, digits, checkpoint: Path):
    return Training(run, *digits, checkpoint).complete(lambda step: None)


def same(one, other) -> bool:
    return all(torch.equal(getattr(one, name), getattr(other, name)) for name in vars(one))


def test_the_network_is_that_of_section_4_1():
    plain, normalised = (sigmoid_network(784, batch_norm, 0.05, seed=1) for batch_norm in (False, True))
    linear = [[layer for layer in net if isinstance(layer, nn.Linear)] for net in (plain, normalised)]
    for layers in linear:
        assert [(layer.in_features, layer.out_features) for layer in layers] == [
            (784, 100),
            (100, 100),
            (100, 100),
            (100, 10),
        ]
    assert all(torch.equal(a.weight, b.weight) for a, b in zip(*linear, strict=True))
    assert linear[0][0].weight.std().item() == pytest.approx(0.05, rel=0.02)
    assert [layer.bias is None for layer in linear[1]] == [True, True, True, False]
    assert [type(layer) for layer in normalised][:3] == [nn.Linear, syncbn.SyncBatchNorm, nn.Sigmoid]
    assert sum(p.numel() for p in plain.parameters()) == 784 * 100 + 2 * 100 * 100 + 1000 + 310
    other = sigmoid_network(784, True, 0.05, seed=2)
    assert not torch.equal(other[0].weight, linear[1][0].weight)


def test_training_is_plain_sgd_with_batch_norm(digits, tmp_path):
    """Against torch's own layers in a loop of its own."""
    found = curves(RUN, digits, tmp_path / "run.pt")
    (images, labels), (test_images, test_labels) = ((part.images.double(), part.labels) for part in digits)
    network = sigmoid_network(36, True, RUN.weight_std, RUN.seed).double()
    network = nn.Sequential(
        *(nn.BatchNorm1d(100).double() if i in (1, 4, 7) else layer for i, layer in enumerate(network))
    )
    for step in range(RUN.steps):
        order = epoch_order(300, RUN.seed, step // 10)
        samples = torch.from_numpy(order[step % 10 * 30 :][:30])
        loss = F.cross_entropy(network(images[samples]), labels[samples])
        gradients = torch.autograd.grad(loss, list(network.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                parameter -= RUN.learning_rate * gradient
    network.eval()
    with torch.no_grad():
        logits = network(test_images)
        inputs = network[:-2](test_images)
    assert found.steps.tolist() == [0, 10, 20, 30, 40]
    assert float(found.loss[-1]) == pytest.approx(float(F.cross_entropy(logits, test_labels)), rel=1e-9)
    assert float(found.accuracy[-1]) == pytest.approx(float((logits.argmax(1) == test_labels).double().mean()))
    expected = np.percentile(inputs.numpy(), (15, 50, 85), axis=0)
    assert found.percentiles[-1].numpy() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert float(found.accuracy[-1]) > 0.3 > float(found.accuracy[0])


@pytest.mark.parametrize("batch_norm", [False, True])
def test_an_interrupted_run_goes_on_to_the_same_end(digits, tmp_path, monkeypatch, batch_norm):
    monkeypatch.setattr(module, "STEPS_BETWEEN_CHECKPOINTS", 7)
    run = replace(RUN, batch_norm=batch_norm)
    expected = curves(run, digits, tmp_path / "whole.pt")

    def interrupt(step: int) -> None:
        if step == 30:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Training(run, *digits, tmp_path / "run.pt").complete(interrupt)
    again = Training(run, *digits, tmp_path / "run.pt")
    assert again.step == 28
    assert same(again.complete(lambda step: None), expected)
    assert same(curves(run, digits, tmp_path / "run.pt"), expected)  # which is only read now


def test_a_folder_of_other_settings_or_in_use_is_refused(run_main, tmp_path, capsys):
    words = ["--output=out", "--seeds=1", "--settings=[[0.5, 0.1]]"]
    run_main(*words)
    with pytest.raises(SystemExit):
        run_main(*words, "--threshold=60")
    assert "threshold=127" in capsys.readouterr().err
    run_main(*words[:1], words[2], "--seeds=2")  # more seeds, at no cost for the first
    runs = tmp_path / "out" / "runs"
    with claimed_folder(runs, json.loads((runs / "settings.json").read_text())), pytest.raises(SystemExit):
        run_main(*words)
    assert "is in use" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_the_run_and_not_the_experiment(run_main, tmp_path):
    """The first setting diverges; what is known of the second is reported all the same."""
    run_main("--output=out", "--seeds=2", "--settings=[[3e38, 0.1], [0.5, 0.1]]")
    lines = (tmp_path / "out" / "figure1.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| 3e+38")]
    assert rows[0] == ["3e+38", "0.1", "without BN", "0", "diverged"]
    assert rows[-1][:3] == ["3e+38", "0.1", "diverged"]
    assert "plain-lr3e+38-std0.1-seed0-ranks1 diverged: its loss was first found not finite after 10 steps." in lines
    [claims] = [line for line in lines if line.startswith("| 0.5") and "points" in line]
    assert "diverged" not in claims
    with (tmp_path / "out" / "figure1.csv").open(newline="") as found:
        losses = [(row["step"], row["test_loss"]) for row in csv.DictReader(found) if row["network"] == "plain"][:5]
    assert [step for step, loss in losses if loss == "nan"] == ["10", "20", "30", "40"]


def test_the_axis_of_accuracy_holds_every_curve():
    """It begins at the paper's 0.7, unless a network hardly gets there: then it holds all of that curve."""
    nothing = torch.ones(2, dtype=torch.float64), torch.zeros(2, 3, 100, dtype=torch.float64)
    low, high = (
        Curves(torch.tensor([1, 2]), torch.tensor(of_steps, dtype=torch.float64), *nothing)
        for of_steps in ([0.1, 0.4], [0.3, 0.95])
    )
    assert _lowest_accuracy([high, high]) == 0.7
    assert _lowest_accuracy([low, high]) == pytest.approx(0.08)


def test_unsteadiness_by_hand():
    width = np.array([-1.0, 0.0, 1.0])[:, None]
    times = np.array([0.0, 1.0, 2.0, 3.0])[:, None, None]
    steady, drifting = np.zeros((4, 3, 1)) + width, times + width
    wide = 10 * drifting
    found = unsteadiness(np.concatenate([steady, drifting, wide], axis=2))
    assert found.tolist() == pytest.approx([0.0, np.std([0, 1, 2, 3]) / 2, np.std([0, 1, 2, 3]) / 2])
    assert unsteadiness(np.zeros((4, 3, 1))).tolist() == [np.inf]
    assert typical_unit(np.concatenate([wide, 3 * times + width, steady], axis=2)) == 0


@pytest.fixture
def run_main(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["syncbn"])

    def run(*words: str) -> None:
        main(["paper", "figure1", f"--data={folder}", "--steps=40", "--evaluate_every=10", "--batch_size=30", *words])

    return run


def test_the_command_writes_picture_table_and_report_and_ranks_agree(run_main, tmp_path, capsys):
    words = ["--output=out", "--seeds=2", "--settings=[[0.5, 0.1], [0.1, 0.01]]", "--ranks=2", "--precision=float64"]
    run_main(*words)
    picture = cv2.imread(str(tmp_path / "out" / "figure1.png"))
    assert picture.shape[1] > 900 and (tmp_path / "out" / "figure1.png").stat().st_size < 300_000
    with (tmp_path / "out" / "figure1.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert len(rows) == (2 * 2 * 2 + 1) * 5
    report = (tmp_path / "out" / "figure1.md").read_text()
    assert report in capsys.readouterr().out
    assert len([line for line in report.splitlines() if line.startswith("| 0.")]) == 2 * 2 * 3 + 2
    assert "On 2 ranks instead of 1 (batch-norm-lr0.5-std0.1-seed0-ranks2, float64)" in report
    alone, together = (
        torch.load(tmp_path / "out" / "runs" / f"batch-norm-lr0.5-std0.1-seed0-ranks{ranks}.pt", weights_only=True)
        for ranks in (1, 2)
    )
    for name in ("loss", "accuracy", "percentiles"):
        assert together["curves"][name].numpy() == pytest.approx(alone["curves"][name].numpy(), rel=1e-9, abs=1e-9)
    # The same command again reads what it wrote.
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").glob("*.pt")}
    run_main(*words)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out" / "runs").glob("*.pt")} == times


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--seeds=0"], "seeds=0 must be at least 1"),
        (["--ranks=7"], "global_batch_size=30 cannot be divided among 7 ranks"),
        (["--batch_size=500"], "batch_size=500 exceeds the 300 training images"),
        (["--threshold=255"], "threshold=255 must lie in 0..254"),
        (["--settings=[[0.1, 0.1], [0.1, 0.1]]"], "different pairs"),
        (["--settings=[[-1, 0.1]]"], "a learning rate must be positive"),
        (["--settings=[[3e38, 0.1]]", "--stepz=1"], "stepz"),
    ],
)
def test_mistakes_are_answered_in_one_line(run_main, capsys, words, message):
    with pytest.raises(SystemExit) as exited:
        run_main(*words)
    assert exited.value.code == 1
    errors = capsys.readouterr().err.strip().splitlines()
    assert errors[-1].startswith("syncbn: error:") and message in errors[-1]
    assert not any("Traceback" in line for line in errors)


@pytest.mark.skipif(not MNIST.is_dir(), reason=f"there is no {MNIST}")
def test_on_mnist_batch_norm_learns_while_the_plain_network_has_not_begun(tmp_path):
    """The accuracies after 300 steps measured with another implementation: about 0.88, and chance."""
    digits = load_digits(MNIST, 127)
    run = Run(True, 0.1, 0.1, 0, 1, 300, 60, 300, "float32")
    normalised = curves(run, digits, tmp_path / "bn.pt")
    plain = curves(replace(run, batch_norm=False), digits, tmp_path / "plain.pt")
    assert float(normalised.accuracy[-1]) > 0.8 and float(plain.accuracy[-1]) < 0.3
