"""``syncbn statistics``: Algorithm 2 on a checkpoint, the same on any number of ranks, and what it refuses."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from torch import Tensor, nn

from ranks import run_ranks
from syncbn.cli import main
from syncbn.data import Augmentation, ImageDataModule
from syncbn.models.blocks import ConvNorm
from syncbn.training import ImageClassifier, PolyakAveraging, SynchronisedDDPStrategy
from syncbn.training.statistics import StatisticsTrainer
from training.conftest import IGNORED

BATCH_SIZE, BATCHES = 16, 3

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed:UserWarning"),
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]


def make(**options: Any) -> tuple[ImageClassifier, ImageDataModule]:
    """A narrow network in double precision, and 60 training images: three batches of 16."""
    seed_everything(0, verbose=False)
    data = ImageDataModule(BATCH_SIZE, image_size=16, augmentation=Augmentation(max_shift=1), validation_images=9940)
    data.sets.validation.indices = data.sets.validation.indices[:50]
    settings: dict[str, Any] = {"width_multiplier": 0.125, "stem": "small", "learning_rate_per_32_images": 0.01}
    return ImageClassifier(BATCH_SIZE, 10, 1, data.training_images, **(settings | options)).double(), data


def make_trainer(num_ranks: int = 1, **options: Any) -> StatisticsTrainer:
    return StatisticsTrainer(
        accelerator="cpu",
        devices=num_ranks,
        strategy=SynchronisedDDPStrategy(timeout_seconds=30) if num_ranks > 1 else "auto",
        plugins=[TorchElasticEnvironment()] if num_ranks > 1 else None,
        precision="64-true",
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        enable_checkpointing="callbacks" in options,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """After an epoch with Polyak averaging."""
    folder = tmp_path_factory.mktemp("run")
    model, data = make()
    saving = ModelCheckpoint(folder, "trained")
    make_trainer(max_epochs=1, callbacks=[PolyakAveraging(decay=0.5), saving]).fit(model, data)
    return folder / "trained.ckpt"


class DirectStatistics(nn.Module):
    """Algorithm 1 as it is written, in float64, keeping what Algorithm 2 averages."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = layer.weight, layer.bias, layer.eps
        self.means: list[Tensor] = []
        self.unbiased_variances: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        values = x.transpose(0, 1).flatten(1)
        self.means.append(values.mean(1))
        self.unbiased_variances.append(values.var(1, correction=1))
        biased = values.var(1, correction=0)
        mean, var, gamma, beta = (v.view(-1, 1, 1) for v in (self.means[-1], biased, self.weight, self.bias))
        return (x - mean) / torch.sqrt(var + self.eps) * gamma + beta


def direct(checkpoint: Path, parts: int = 1) -> dict[str, Tensor]:
    """The statistics of the checkpoint's weights over the first batches of the first epoch, by nothing of syncbn's.

    With several parts, each of them is a mini-batch.
    """
    model, data = make()
    model.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    model.eval()
    for unit in model.network.modules():
        if isinstance(unit, ConvNorm):
            unit.bn = DirectStatistics(unit.bn)
    with torch.no_grad():
        for _, batch in zip(range(BATCHES), data.train_dataloader(), strict=False):
            for images in batch.images.double().chunk(parts):
                model(images)
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, DirectStatistics):
            assert len(layer.means) == BATCHES * parts
            found[f"{name}.running_mean"] = torch.stack(layer.means).mean(0)
            found[f"{name}.running_var"] = torch.stack(layer.unbiased_variances).mean(0)
    return found


def estimate(
    rank: int, num_ranks: int, checkpoint: Path, output: Path, options: dict[str, Any]
) -> list[dict[str, float]]:
    """In a process of `run_ranks`, whose world Lightning takes as it is."""
    warnings.simplefilter("error")
    for line in (*IGNORED, "ignore:.*callbacks used to create the checkpoint:UserWarning"):
        warnings.filterwarnings("ignore", line.split(":")[1])
    os.environ |= {"LOCAL_RANK": str(rank), "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": str(num_ranks)}
    model, data = make(**options)
    return make_trainer(num_ranks).statistics(model, data, str(checkpoint), output, BATCHES)


def difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest, relative to the largest value of each tensor."""
    return max(float((found[name] - value).abs().max() / value.abs().max()) for name, value in expected.items())


def test_statistics_are_algorithm_2_on_any_number_of_ranks(checkpoint, tmp_path, capsys):
    expected = direct(checkpoint)
    assert len(expected) == 2 * 69
    old = torch.load(checkpoint, weights_only=True)
    assert difference(old["state_dict"], expected) > 0.1  # which could fail
    metrics = {}
    for num_ranks in (1, 2, 4):
        output = tmp_path / f"{num_ranks}.ckpt"
        if num_ranks == 1:
            model, data = make()
            metrics[1] = make_trainer().statistics(model, data, str(checkpoint), output, BATCHES)
        else:
            arguments: tuple[Any, ...] = (num_ranks, checkpoint, output, {})
            metrics[num_ranks] = run_ranks(estimate, num_ranks, *arguments, timeout=90, group_timeout=60)[0]
        new = torch.load(output, weights_only=True)
        assert difference(new["state_dict"], expected) < 1e-10
        for before, after in zip(metrics[1], metrics[num_ranks], strict=True):
            assert after == pytest.approx(before, rel=1e-6)
        for name, value in old["state_dict"].items():
            assert name in expected or torch.equal(new["state_dict"][name], value), name
        for name, value in old["current_model_state"].items():
            assert torch.equal(new["current_model_state"][name], value), name
    assert metrics[1][0] != metrics[1][1]
    assert new["population_statistics"] == {"num_batches": BATCHES, "estimator": "paper"}
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("validation accuracy ") and lines[0].endswith("with the moving averages of trained.ckpt")
    assert lines[1].endswith("with statistics over 3 mini-batches of 16 images (paper)")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.ckpt", "2.ckpt", "4.ckpt"]


def test_a_mini_batch_is_what_normalises_together(checkpoint, tmp_path):
    arguments = (2, checkpoint, tmp_path / "new.ckpt", {"normalization_batch_size": BATCH_SIZE // 2})
    run_ranks(estimate, 2, *arguments, timeout=90, group_timeout=60)
    new = torch.load(tmp_path / "new.ckpt", weights_only=True)["state_dict"]
    assert difference(new, direct(checkpoint, parts=2)) < 1e-10
    assert difference(new, direct(checkpoint)) > 1e-3


def test_the_new_checkpoint_validates_as_was_reported(checkpoint, tmp_path):
    model, data = make()
    _, reported = make_trainer().statistics(model, data, str(checkpoint), tmp_path / "new.ckpt", BATCHES, "pooled")
    model, data = make()
    [found] = make_trainer().validate(model, data, ckpt_path=tmp_path / "new.ckpt", weights_only=True, verbose=False)
    assert found == pytest.approx(reported)


def test_estimators_differ(checkpoint, tmp_path):
    found = []
    for estimator in ("paper", "pooled"):
        model, data = make()
        make_trainer().statistics(model, data, str(checkpoint), tmp_path / "new.ckpt", BATCHES, estimator)
        found.append(torch.load(tmp_path / "new.ckpt", weights_only=True)["state_dict"])
    name = "network.inception_5b.branch_3x3.spatial.bn.running_"
    assert torch.allclose(found[0][f"{name}mean"], found[1][f"{name}mean"])  # the batches are of one size
    assert not torch.allclose(found[0][f"{name}var"], found[1][f"{name}var"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_batches": 0}, r"num_batches=0 must lie in 1\.\.3, the batches of 16 in an epoch of 60 training images"),
        ({"num_batches": 4}, r"num_batches=4 must lie in 1\.\.3"),
        ({"output": "same"}, "is the checkpoint itself"),
        ({"output": Path("/no/folder/new.ckpt")}, "there is no folder /no/folder"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_runs(checkpoint, tmp_path, arguments, message):
    given = {"output": tmp_path / "new.ckpt", "num_batches": 2} | arguments
    given["output"] = checkpoint if given["output"] == "same" else given["output"]
    model, data = make()
    with pytest.raises(ValueError, match=message):
        make_trainer().statistics(model, data, str(checkpoint), **given)
    assert not (tmp_path / "new.ckpt").exists()


def test_a_network_without_batch_norm_has_none(tmp_path):
    model, data = make(norm="none")
    trainer = make_trainer()
    trainer.strategy.connect(model)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="no BatchNorm layer"):
        make_trainer().statistics(model, data, str(tmp_path / "plain.ckpt"), tmp_path / "new.ckpt", 1)
    assert [path.name for path in tmp_path.iterdir()] == ["plain.ckpt"]


COMMON = [
    *("--data.image_size=16", "--data.validation_images=9900", "--global_batch_size=16", "--model.stem=small"),
    *("--model.width_multiplier=0.125", "--trainer.devices=1", "--trainer.accelerator=cpu"),
    *("--trainer.limit_val_batches=2", "--trainer.enable_progress_bar=false"),
]


def test_the_command(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["syncbn"])
    output = tmp_path / "new.ckpt"
    words = [*COMMON, f"--ckpt_path={checkpoint}", f"--output={output}", "--num_batches=2", "--estimator=pooled"]
    main(["statistics", *words])
    assert capsys.readouterr().out.strip().splitlines()[-1] == str(output)
    main(["validate", *COMMON, f"--ckpt_path={output}"])
    assert "with new.ckpt" in capsys.readouterr().out
    for bad, message in (("--num_batches=99", "num_batches=99"), ("--estimator=median", "median")):
        with pytest.raises(SystemExit):
            main(["statistics", *words, bad])
        assert message in capsys.readouterr().err.strip().splitlines()[-1]
