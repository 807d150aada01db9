"""What a run tells of itself in a log, and in a terminal."""

import io
import re
import sys

from lightning.pytorch import Trainer, seed_everything

from syncbn.data import ImageDataModule
from syncbn.training import ImageClassifier, Throughput
from syncbn.training.monitoring.progress import RunBar, RunLines, progress_callback


def train(*callbacks, **options):
    """Three steps of two passes in each of two epochs."""
    seed_everything(0)
    data = ImageDataModule(8, image_size=8, validation_images=9976, seed=0)
    model = ImageClassifier(8, 10, 1, data.training_images, width_multiplier=0.125, stem="small")
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    options |= {"max_epochs": 2, "limit_val_batches": 2, "accumulate_grad_batches": 2}
    trainer = Trainer(accelerator="cpu", devices=1, callbacks=[Throughput(), *callbacks], **quiet, **options)
    trainer.fit(model, data)
    return trainer


def test_a_log_has_a_line_for_every_so_many_steps_and_each_validation(capsys):
    assert isinstance(progress_callback(), RunLines)
    train(RunLines(), log_every_n_steps=2)
    lines = capsys.readouterr().out.splitlines()
    time, seconds = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", r", \d:\d\d:\d\d left"
    steps = [line for line in lines if "loss" in line and "val" not in line]
    for line, (epoch, step) in zip(steps, [(1, 2), (2, 4), (2, 6)], strict=True):
        figures = r"loss \d\.\d+, lr [\d.e-]+, [\d,]+ images/s"
        assert re.fullmatch(rf"{time}epoch {epoch}/2, step {step}/6, {figures}{seconds}", line)
    validations = [line for line in lines if "val accuracy" in line]
    for line, (epoch, step) in zip(validations, [(1, 3), (2, 6)], strict=True):
        figures = r"val accuracy \d+\.\d\d %, val loss \d+\.\d+"
        assert re.fullmatch(rf"{time}epoch {epoch}/2, step {step}/6, {figures}{seconds}", line)


def test_a_long_evaluation_tells_of_itself_too(capsys, monkeypatch):
    monkeypatch.setattr("syncbn.training.monitoring.progress.SECONDS_BETWEEN_LINES", 0.0)
    train(RunLines(), log_every_n_steps=100)
    out = capsys.readouterr().out
    assert out.count("validation batch 2/2") == 2 and out.count(", step 5/6, loss") == 1


def test_the_bar_of_a_terminal_is_that_of_the_run_and_fits_80_columns(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda file: (80, 24))
    assert isinstance(progress_callback(), RunBar)
    train(RunBar(), log_every_n_steps=1)
    drawn = [line for line in re.split(r"[\r\n]+", screen.getvalue()) if "left" in line]
    assert drawn[0].startswith("epoch 1/2   0%") and "/6 [" in drawn[0]
    assert re.match(r"epoch 2/2 100%.*\| 6/6 \[00:00 left, loss .* im/s, val \d+\.\d\d %\]", drawn[-1])
    assert max(map(len, drawn)) <= 80 and not any("v_num" in line for line in drawn)
