"""The confusion matrix and the accuracy of every class: what is counted, written and drawn."""

import csv
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from syncbn.data import ImageDataModule
from syncbn.training import ClassReport, ImageClassifier
from syncbn.training.run.class_report import accuracies, commonest_confusions, draw_confusion, strongest, write_classes

COUNTS = np.array([[8, 2, 0], [0, 5, 0], [0, 0, 0]])
CLASSES = ["cat", "dog", "eel"]


def rows_of(path: Path) -> list[list[str]]:
    with path.open(newline="") as lines:
        return list(csv.reader(lines))


def test_a_row_for_each_class(tmp_path):
    write_classes(tmp_path / "classes.csv", COUNTS, CLASSES)
    assert rows_of(tmp_path / "classes.csv")[1:] == [
        ["cat", "10", "8", "0.8000", "dog", "2"],
        ["dog", "5", "5", "1.0000", "", "0"],
        ["eel", "0", "0", "", "", "0"],
    ]
    assert accuracies(COUNTS)[:2].tolist() == [0.8, 1.0] and np.isnan(accuracies(COUNTS)[2])


def test_the_commonest_confusions_come_first():
    counts = np.array([[5, 1, 0], [7, 5, 0], [0, 2, 5]])
    assert [line.split() for line in commonest_confusions(counts, CLASSES)] == [
        ["7", "dog", "as", "cat"],
        ["2", "eel", "as", "dog"],
        ["1", "cat", "as", "dog"],
    ]


def test_of_many_classes_the_strongest_field_is_seen():
    shares = np.zeros((1000, 1000))
    shares[3, 998] = 0.7
    assert strongest(shares).shape == (250, 250) and strongest(shares)[0, 249] == 0.7
    assert strongest(np.eye(251)).shape == (126, 126)
    assert np.array_equal(strongest(np.eye(10)), np.eye(10))


@pytest.mark.parametrize("classes", [1, 10, 30, 1000])
def test_pictures_of_few_and_many_classes(classes, tmp_path):
    generator = np.random.default_rng(0)
    counts = generator.integers(0, 3, (classes, classes)) + 20 * np.eye(classes, dtype=int)
    draw_confusion(tmp_path / "confusion.png", counts, [f"a rather long name of class {n}" for n in range(classes)])
    picture = cv2.imread(str(tmp_path / "confusion.png"))
    assert picture is not None and picture.shape[1] > picture.shape[0] > 500
    assert len(np.unique(picture)) > 20


def trainer(folder: Path, report: ClassReport) -> Trainer:
    return Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        callbacks=[report],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        max_epochs=2,
        limit_test_batches=3,
    )


def test_after_a_fit_and_in_a_test(tmp_path):
    seed_everything(0)
    data = ImageDataModule(32, image_size=8, validation_images=9960)
    data.sets.validation.indices = data.sets.validation.indices[:50]
    model = ImageClassifier(32, 10, 1, 40, width_multiplier=0.125, stem="small", learning_rate_per_32_images=0.01)
    run = trainer(tmp_path, ClassReport(str(tmp_path / "report")))
    run.fit(model, data)
    validation = tmp_path / "report" / "confusion_val.csv"
    counts = np.array([row[1:] for row in rows_of(validation)[1:]], dtype=int)
    truth = np.zeros((10, 10), dtype=int)
    with torch.no_grad():
        for batch in data.val_dataloader():
            for label, guess in zip(batch.labels, model.eval()(batch.images).argmax(1), strict=True):
                truth[label, guess] += 1
    assert np.array_equal(counts, truth) and counts.sum() == 50
    run.test(model, data, verbose=False)
    counts = np.array([row[1:] for row in rows_of(tmp_path / "report" / "confusion_test.csv")[1:]], dtype=int)
    assert counts.sum() == 96
    assert np.trace(counts) / 96 == pytest.approx(float(run.callback_metrics["test_top1"]))
    assert (tmp_path / "report" / "confusion_test.png").is_file()
    validation.unlink()
    (tmp_path / "report" / "confusion_test.csv").unlink()
    data.sets = replace(data.sets, test=None, test_from=None)
    assert run.test(model, data, verbose=False)[0].keys() == {
        f"val_{name}" for name in ("images", "loss", "top1", "top5")
    }
    assert np.array_equal(truth, [[int(field) for field in row[1:]] for row in rows_of(validation)[1:]])
    assert run.callback_metrics["val_top1"] == np.float32(np.trace(truth) / 50)
    assert not (tmp_path / "report" / "confusion_test.csv").exists(), "no figure of validation images is called test"


def test_an_embedding_has_no_classes(tmp_path):
    data = ImageDataModule(32, image_size=8, validation_images=9960)
    model = ImageClassifier(32, 10, 1, 40, width_multiplier=0.125, stem="small", embedding_dimension=4)
    with pytest.raises(ValueError, match="ClassReport needs class probabilities"):
        trainer(tmp_path, ClassReport()).fit(model, data)
