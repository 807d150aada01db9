"""What Lightning's Trainer and callbacks do under ``syncbn fit``: every row of the tables in docs/lightning.md."""

import inspect
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from jsonargparse import Namespace
from lightning.pytorch import Trainer, callbacks

from syncbn.cli import main
from syncbn.training.configuration.lightning_support import CALLBACKS, TRAINER_OPTIONS, markdown_tables, refuse_options

ROOT = Path(__file__).parents[2]
FASHION_MNIST = ROOT / "configs" / "fashion_mnist.yaml"


def spec(name, package="lightning.pytorch.callbacks", **arguments):
    """An object as a config describes it."""
    return Namespace(class_path=f"{package}.{name}", init_args=Namespace(**arguments))


REFUSED = {
    "logger": ({"logger": False}, "trainer.logger=false: "),
    "min_epochs": ({"min_epochs": 3, "max_epochs": 2}, "trainer.min_epochs=3 with trainer.max_epochs=2: "),
    "min_steps": ({"min_steps": 9, "max_steps": 8}, "trainer.min_steps=9 with trainer.max_steps=8: "),
    "max_time": ({"max_time": "00:00:00:09", "callbacks": [spec("Timer", duration="00:00:00:10")]}, "Timer(duration="),
    "val_check_interval": ({"val_check_interval": timedelta(minutes=5)}, "give batches"),
    "check_val_every_n_epoch": ({"check_val_every_n_epoch": 0}, "limit_val_batches=0 is for no validation"),
    "gradient_clip_val": ({"gradient_clip_val": -1.0}, "null clips nothing"),
    "enable_checkpointing": ({"enable_checkpointing": False}, "checkpointing=null"),
    "accumulate_grad_batches": ({"accumulate_grad_batches": 0}, "trainer.accumulate_grad_batches=0: "),
    "profiler": ({"profiler": "xla"}, "trainer.profiler=xla: "),
    "barebones": ({"barebones": True}, "trainer.barebones=true: "),
    "plugins": ({"plugins": [spec("TorchCheckpointIO", "lightning.pytorch.plugins.io")]}, "TorchCheckpointIO()"),
    "sync_batchnorm": ({"sync_batchnorm": True}, "synchronised already"),
    "default_root_dir": ({"default_root_dir": "here"}, "use runs_folder"),
    "model_registry": ({"model_registry": "mine"}, "not uploaded"),
}
TAKEN = {
    "logger": True,
    "min_epochs": 2,
    "max_epochs": 2,
    "min_steps": 8,
    "max_steps": -1,
    "max_time": "00:00:00:09",
    "val_check_interval": 0.5,
    "check_val_every_n_epoch": None,
    "gradient_clip_val": 0,
    "enable_checkpointing": None,
    "accumulate_grad_batches": 2,
    "profiler": "simple",
    "barebones": False,
    "plugins": None,
    "sync_batchnorm": False,
    "default_root_dir": None,
    "model_registry": None,
    "callbacks": [spec("EarlyStopping", monitor="val_loss"), spec("ModelCheckpoint")],
}


def test_every_option_and_every_callback_of_lightning_has_a_row():
    assert [row.name for row in TRAINER_OPTIONS] == list(inspect.signature(Trainer.__init__).parameters)[1:]
    assert {row.name for row in CALLBACKS} == set(callbacks.__all__)
    assert {row.name for row in TRAINER_OPTIONS if row.refuses} == set(REFUSED)
    assert all(row.note for row in (*TRAINER_OPTIONS, *CALLBACKS) if row.refuses)


def test_the_documentation_shows_the_tables():
    assert markdown_tables() in (ROOT / "docs" / "lightning.md").read_text()


@pytest.mark.parametrize("name", REFUSED)
def test_an_option_is_refused_with_its_value_and_what_to_do(name):
    options, expected = REFUSED[name]
    with pytest.raises(ValueError, match=rf"^trainer\.{name}=") as refused:
        refuse_options({**TAKEN, **options}, 8)
    assert expected in str(refused.value) and "\n" not in str(refused.value)
    refuse_options(TAKEN, 8)


@pytest.mark.parametrize("row", [row for row in CALLBACKS if row.refuses], ids=lambda row: row.name)
def test_a_callback_is_refused_with_the_batch_that_was_asked_for(row):
    with pytest.raises(ValueError, match=rf"^trainer\.callbacks: {row.name}\(\) with global_batch_size=8: "):
        refuse_options({"callbacks": spec(row.name)}, 8)


def test_what_derives_from_a_refused_callback_is_refused():
    class Mine(callbacks.GradientAccumulationScheduler):
        pass

    with pytest.raises(ValueError, match=r"use trainer\.accumulate_grad_batches"):
        refuse_options({"callbacks": [Mine({0: 2})]}, 8)


WORKING: dict[str, dict[str, object]] = {
    "DeviceStatsMonitor": {},
    "EarlyStopping": {"monitor": "val_loss", "patience": 1, "min_delta": 100.0, "verbose": True},
    "EMAWeightAveraging": {},
    "LambdaCallback": {"on_fit_start": "builtins.print"},
    "LearningRateMonitor": {},
    "ModelCheckpoint": {"filename": "{epoch}", "save_top_k": -1},
    "ModelSummary": {},
    "ThroughputMonitor": {"batch_size_fn": "builtins.len"},
    "Timer": {"duration": "00:01:00:00"},
    "TQDMProgressBar": {},
}
OPTIONS = {
    **{"max_epochs": 4, "min_epochs": 1, "max_steps": 100, "min_steps": 1, "limit_train_batches": 4},
    **{"limit_val_batches": 1, "limit_test_batches": 1, "val_check_interval": 0.5, "check_val_every_n_epoch": 1},
    **{"num_sanity_val_steps": 1, "accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "log_every_n_steps": 1},
    **{"gradient_clip_algorithm": "value", "inference_mode": False, "profiler": "simple", "detect_anomaly": True},
    **{"reload_dataloaders_every_n_epochs": 1, "enable_autolog_hparams": False, "enable_model_summary": True},
    **{"accelerator": "cpu", "devices": 1, "num_nodes": 1, "deterministic": True, "use_distributed_sampler": True},
}


@pytest.mark.usefixtures("own_folder")
@pytest.mark.filterwarnings("ignore")
def test_what_works_works_together_and_says_what_was_asked_for(monkeypatch, capsys, caplog):
    described = [
        {"class_path": f"lightning.pytorch.callbacks.{name}", "init_args": arguments}
        for name, arguments in WORKING.items()
    ]
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "more", "name": "added"}}
    options = {**OPTIONS, "callbacks": described, "logger": logger}
    Path("options.yaml").write_text(yaml.safe_dump({"trainer": options, "model": {"width_multiplier": 0.0625}}))
    monkeypatch.setattr(sys, "argv", ["syncbn"])
    words = ["--config=options.yaml", "--data.image_size=16", "--global_batch_size=32"]
    main(["fit", f"--config={FASHION_MNIST}", *words])
    run = Path("runs/fashion_mnist/version_0")
    captured = capsys.readouterr()
    printed = captured.out + captured.err + caplog.text
    for said in (
        "FIT Profiler Report",
        "Monitored metric val_loss did not improve",
        "estimated model params size",
        "an epoch is 2 of",
    ):
        assert said in printed, said
    assert "training ended early, after step 2: EarlyStopping: Monitored metric val_loss" in printed
    assert {"epoch=0.ckpt", "last.ckpt"} <= {path.name for path in (run / "checkpoints").iterdir()}
    columns = (run / "metrics.csv").read_text().splitlines()[0]
    assert "lr-SGD" in columns and "DeviceStatsMonitor" in columns and "train/samples" in columns
    assert Path("more/added/version_0/metrics.csv").is_file()
    assert "val_loss did not improve" in yaml.safe_load((run / "summary.json").read_text())["ended_early"]
