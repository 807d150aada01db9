"""What CovariateShift records, against the inputs themselves."""

import csv
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from ranks import run_ranks
from syncbn.cli import main
from syncbn.training import CovariateShift
from syncbn.training.monitoring.covariate_shift import distribution, find_modules


class Small(LightningModule):
    """A network whose layers' inputs can be worked out by hand: the first layer's are the images."""

    def __init__(self) -> None:
        super().__init__()
        self.block_1 = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())
        self.block_2 = nn.Sequential(nn.Conv2d(4, 2, 1), nn.ReLU())
        self.unused = nn.Linear(2, 2)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.block_2(self.block_1(batch[0])).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


IMAGES = torch.randn(24, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def fit(folder: Path, *callbacks: CovariateShift, **options: Any) -> list[dict[str, str]]:
    """Six batches of four images; returns the rows of the CSV log."""
    loggers = [CSVLogger(folder), TensorBoardLogger(folder)]
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=loggers,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    torch.manual_seed(0)
    module = Small()
    trainer.fit(module, DataLoader(TensorDataset(IMAGES), batch_size=4))
    assert not any(layer._forward_pre_hooks for layer in module.modules())
    log = Path(loggers[0].log_dir) / "metrics.csv"
    with log.open(newline="") as lines:
        return list(csv.DictReader(lines))


def check(row: dict[str, str], layer: str, values: Tensor) -> None:
    expected = dict(zip(("p15", "p50", "p85"), np.percentile(values.double(), (15, 50, 85)), strict=True))
    expected |= {"mean": float(values.double().mean()), "variance": float(values.double().var(correction=0))}
    for name, value in expected.items():
        assert float(row[f"input/{layer}/{name}"]) == pytest.approx(value, rel=1e-6, abs=1e-7), name


@pytest.mark.parametrize("channel", [0, 2, None])
def test_the_inputs_of_every_nth_step_are_described(tmp_path, channel):
    rows = fit(tmp_path, CovariateShift(["block_1"], every_n_steps=2, channel=channel), log_every_n_steps=1)
    rows = [row for row in rows if row.get("input/block_1/mean")]
    assert [int(row["step"]) for row in rows] == [0, 2, 4]
    for row in rows:
        first = 4 * int(row["step"])
        batch = IMAGES[first : first + 4]
        check(row, "block_1", batch if channel is None else batch[:, channel])
    assert list(tmp_path.rglob("events.out.tfevents.*"))


def test_accumulated_batches_are_one(tmp_path):
    rows = fit(tmp_path, CovariateShift(["block_1"], every_n_steps=1), accumulate_grad_batches=3, log_every_n_steps=1)
    assert [int(row["step"]) for row in rows] == [0, 1]
    check(rows[1], "block_1", IMAGES[12:, 0])


def test_of_many_values_some_are_measured(tmp_path):
    [row] = fit(tmp_path, CovariateShift(["block_1"], every_n_steps=100, max_values=40), log_every_n_steps=1)
    check(row, "block_1", IMAGES[:4, 0].flatten()[::3])
    [row] = fit(tmp_path, CovariateShift(["block_1"], every_n_steps=100, max_values=20), log_every_n_steps=1)
    check(row, "block_1", IMAGES[:4, 0].flatten()[::6])  # every fifth would be of one column


def test_measuring_does_not_change_training(tmp_path):
    assert fit(tmp_path / "with", CovariateShift(["block_*"], 1, None), log_every_n_steps=1)

    def trained(*callbacks: CovariateShift) -> list[Tensor]:
        torch.manual_seed(0)
        module = Small()
        options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = Trainer(accelerator="cpu", max_epochs=1, callbacks=list(callbacks), **options)
        trainer.fit(module, DataLoader(TensorDataset(IMAGES), batch_size=4))
        return list(module.parameters())

    assert all(map(torch.equal, trained(), trained(CovariateShift(["block_*"], 1))))


def test_names_and_patterns():
    module = Small()
    assert list(find_modules(module, ["block_*"])) == ["block_1", "block_2"]
    assert list(find_modules(module, ["block_2.0", "block_?.1"])) == ["block_1.1", "block_2.0", "block_2.1"]
    with pytest.raises(ValueError, match=r"no layer 'block_9'; there are: block_1, block_2, unused"):
        find_modules(module, ["block_1", "block_9"])
    with pytest.raises(ValueError, match=r"no layer 'block_1\.7'; there are: block_1\.0, block_1\.1"):
        find_modules(module, ["block_1.7"])
    with pytest.raises(ValueError, match=r"'unused\.weight'; unused has no layers of its own"):
        find_modules(module, ["unused.weight"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": ["nothing"]}, "there is no layer 'nothing'; there are: block_1, block_2, unused"),
        ({"layers": ["unused"]}, "unused was not run in step 0$"),
        ({"layers": ["block_1"], "channel": 3}, r"channel=3, but the input of block_1 has channels 0\.\.2"),
        ({"layers": []}, "layers is empty"),
        ({"layers": ["block_1"], "every_n_steps": 0}, "every_n_steps=0 must be at least 1"),
        ({"layers": ["block_1"], "max_values": 0}, "max_values=0 must be at least 1"),
        ({"layers": ["block_1"], "channel": -1}, "channel=-1 must not be negative"),
    ],
)
def test_mistakes(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, CovariateShift(**arguments), log_every_n_steps=1)


@pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning")
def test_in_a_config_of_fit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["syncbn"])
    config = Path(__file__).parents[2] / "configs" / "fashion_mnist.yaml"
    words = ["fit", f"--config={config}", "--config=shift.yaml", "--data.image_size=8", "--global_batch_size=32"]
    words += ["--trainer.devices=1", "--trainer.max_epochs=1", "--trainer.limit_train_batches=3"]
    words += ["--trainer.limit_val_batches=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    words += ["--trainer.log_every_n_steps=1", "--test_after_fit=false"]

    def callback(layer: str) -> None:
        arguments = f"{{layers: [{layer}], every_n_steps: 2}}"
        text = f"trainer: {{callbacks: [{{class_path: syncbn.training.CovariateShift, init_args: {arguments}}}]}}"
        Path("shift.yaml").write_text(text)

    callback("network.inception_4?, network.inception_4a.branch_1x1.bn")
    main(words)
    with Path("runs/fashion_mnist/version_0/metrics.csv").open(newline="") as lines:
        rows = [row for row in csv.DictReader(lines) if row["input/network.inception_4e/p85"]]
    assert [row["step"] for row in rows] == ["0", "2"]
    assert len([name for name in rows[0] if name.startswith("input/")]) == 5 * 6
    assert float(rows[0]["input/network.inception_4a.branch_1x1.bn/variance"]) > 0
    for layer, message in {
        "network.inception_6z": "there is no layer 'network.inception_6z'; there are: network.stem, ",
        "network.inception_4a.branch_1x1": "CovariateShift: network.inception_4a.branch_1x1 was not run in step 0: name"
        " a layer in it: network.inception_4a.branch_1x1.conv, network.inception_4a.branch_1x1.bn",
    }.items():
        callback(layer)
        sys.argv[:] = ["syncbn"]
        with pytest.raises(SystemExit):
            main(words)
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith(f"syncbn: error: {message}")


SHARES = (slice(0, 5), slice(5, 5), slice(5, 24))


def of_rank(rank: int) -> Any:
    return distribution(IMAGES[SHARES[rank]].flatten(1))


def test_the_distribution_is_that_of_all_ranks():
    alone = distribution(IMAGES.flatten(1))
    assert alone.mean == pytest.approx(IMAGES.flatten(1).double().mean(0).numpy())
    assert alone.percentiles.shape == (3, 75)
    for found in run_ranks(of_rank, 3):
        assert all(map(np.array_equal, found, alone))
