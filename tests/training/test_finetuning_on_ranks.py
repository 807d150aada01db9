"""Fine-tuning on two ranks is fine-tuning on one: losses, weights, statistics, metrics and reports."""

import csv
from pathlib import Path

import pytest

from training.conftest import result_of_worker

WORKER = Path(__file__).with_name("finetuning_worker.py")
POLICIES = ["weighted", "partial", "estimate", "gradual", "embedding"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("finetuning")


@pytest.fixture(scope="module")
def runs(folder):
    """The results of the worker on 1 and 2 ranks."""
    return {ranks: result_of_worker(WORKER, ranks, folder) for ranks in (1, 2)}


@pytest.mark.parametrize("policy", POLICIES)
def test_two_ranks_are_one(runs, policy):
    alone, together = runs[1][policy], runs[2][policy]
    assert len(alone["losses"]) == 4
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-10)
    assert together["state"] == pytest.approx(alone["state"], rel=1e-8, abs=1e-10)
    assert together["validation"] == pytest.approx(alone["validation"], rel=1e-6)


def test_policies_make_a_difference(runs):
    losses = [tuple(runs[1][policy]["losses"]) for policy in POLICIES]
    assert len(set(losses)) == len(POLICIES)


def test_every_image_is_in_the_report_once(runs, folder):
    for policy in POLICIES[:-1]:
        reports = []
        for ranks in (1, 2):
            with (folder / str(ranks) / policy / "confusion_val.csv").open(newline="") as lines:
                reports.append([[int(field) for field in row[1:]] for row in list(csv.reader(lines))[1:]])
        assert reports[0] == reports[1]
        assert sum(map(sum, reports[0])) == 33
        hits = sum(reports[0][label][label] for label in range(10))
        assert runs[2][policy]["validation"]["val_top1"] == pytest.approx(hits / 33)


def test_recall_is_of_the_whole_set(runs):
    recall = runs[2]["embedding"]["validation"]
    assert recall.pop("val_images") == 33
    assert set(recall) == {f"val_recall_at_{k}" for k in (1, 2, 4, 8)}
    assert all(value * 33 == pytest.approx(round(value * 33)) for value in recall.values())
    assert 0 < recall["val_recall_at_1"] <= recall["val_recall_at_8"] <= 1
