"""Evaluation averages probabilities: over crops, and over the networks of several checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from syncbn.data import EvaluationCrops, ImageDataModule
from syncbn.preprocessing import find_preprocessing
from syncbn.training import Ensemble, ImageClassifier
from syncbn.training.command import SyncBNCLI
from syncbn.training.evaluation import load_ensemble

IMAGES = 2

pytestmark = [
    pytest.mark.filterwarnings("ignore:You are using a custom batch sampler"),
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]


def make_data(crops: int) -> ImageDataModule:
    data = ImageDataModule(8, image_size=8, validation_images=IMAGES, evaluation_crops=crops)
    data.sets.test.images, data.sets.test.labels = data.sets.test.images[:IMAGES], data.sets.test.labels[:IMAGES]
    return data


def make_model(seed: int = 0, **options: object) -> ImageClassifier:
    seed_everything(seed, verbose=False)
    settings = {"width_multiplier": 0.125, "stem": "small"} | options
    model = ImageClassifier(8, 10, 1, 100, **settings)
    for layer in model.modules():  # as if trained, or all classes would be equally likely
        if isinstance(layer, torch.nn.Linear):
            torch.nn.init.normal_(layer.weight, std=2.0)
    return model.double().eval()


def make_trainer() -> Trainer:
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", devices=1, precision="64-true", **options)


def one_crop_at_a_time(models: list[ImageClassifier], data: ImageDataModule) -> torch.Tensor:
    """Mean probabilities, shape (IMAGES, 10), float64: each crop alone through each network."""
    means = []
    for index in range(IMAGES):
        crops = EvaluationCrops(8, count=data.crops.count)(data.sets.test.image(index))
        total = torch.zeros(10, dtype=torch.float64)
        for crop in crops:
            pixels = torch.from_numpy(crop.copy()).permute(2, 0, 1)[None] / 255
            image = ((pixels - data.sets.test.mean[0]) / data.sets.test.std[0]).double()
            for model in models:
                with torch.no_grad():
                    total += model(image)[0].double().softmax(0)
        means.append(total / len(crops) / len(models))
    return torch.stack(means)


@pytest.mark.parametrize("crops", [1, 10, 144])
@pytest.mark.parametrize("members", [1, 2])
def test_probabilities_are_averaged(crops, members):
    models, data = [make_model(seed) for seed in range(members)], make_data(crops)
    model = models[0] if members == 1 else Ensemble(models, 10)
    expected = one_crop_at_a_time(models, data)
    batches = make_trainer().predict(model, data)
    probabilities = torch.cat([batch["probabilities"] for batch in batches])
    torch.testing.assert_close(probabilities, expected)
    labels = torch.tensor([data.sets.test.label(index) for index in range(IMAGES)])
    [metrics] = make_trainer().test(model, data, verbose=False)
    assert metrics["test_top1"] == pytest.approx(float((expected.argmax(1) == labels).double().mean()))
    hits = (expected.topk(5).indices == labels[:, None]).any(1)
    assert metrics["test_top5"] == pytest.approx(float(hits.double().mean()))
    loss = -expected.log()[torch.arange(IMAGES), labels].mean()
    assert metrics["test_loss"] == pytest.approx(float(loss), rel=1e-5)  # the mean is of float32


def test_the_mean_of_probabilities_is_not_that_of_logits():
    models, data = [make_model(seed) for seed in range(2)], make_data(10)
    expected = one_crop_at_a_time(models, data)
    images = torch.cat([batch.images for batch in data.test_dataloader()]).double()
    with torch.no_grad():
        logits = sum(model(images.flatten(0, 1)).unflatten(0, images.shape[:2]).mean(1) for model in models) / 2
    assert (logits.softmax(1) - expected).abs().max() > 1e-3


def save(model: ImageClassifier, path: Path) -> str:
    trainer = make_trainer()
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path)
    return str(path)


def test_checkpoints_of_networks_that_differ(tmp_path):
    members = [make_model(0), make_model(1, dropout=0.1, activation="sigmoid")]
    paths = [save(member, tmp_path / f"{number}.ckpt") for number, member in enumerate(members)]
    ensemble = load_ensemble(paths, make_model(2)).double().eval()
    images = torch.randn(3, 1, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = sum(member(images).softmax(1) for member in members) / 2
        torch.testing.assert_close(ensemble.log_probabilities(images).exp(), expected)


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    path = save(make_model(0), tmp_path / "good.ckpt")
    (tmp_path / "junk.ckpt").write_bytes(b"junk")
    for paths, like, message in (
        ([str(tmp_path / "none.ckpt")], make_model(), "there is no file .*none.ckpt"),
        ([path, str(tmp_path / "junk.ckpt")], make_model(), "junk.ckpt is not a checkpoint"),
        ([path], make_model(variant="slim"), "good.ckpt has variant=paper, the config slim"),
    ):
        with pytest.raises(ValueError, match=message) as raised:
            load_ensemble(paths, like)
        assert "\n" not in str(raised.value)


def test_the_command_averages_checkpoints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    paths = [save(make_model(seed), tmp_path / f"{seed}.ckpt") for seed in range(2)]
    words = ["--data.image_size=8", "--data.evaluation_crops=144", "--global_batch_size=8", "--trainer.accelerator=cpu"]
    words += ["--trainer.devices=1", "--trainer.limit_test_batches=2", "--model.width_multiplier=0.125"]
    words += ["--model.stem=small", "--trainer.enable_progress_bar=false", f"--checkpoints=[{paths[0]},{paths[1]}]"]
    monkeypatch.setattr("sys.argv", ["syncbn", "test", *words])
    command = SyncBNCLI()
    assert isinstance(command.model, Ensemble) and len(command.model.members) == 2
    assert capsys.readouterr().out.strip().splitlines()[-1].endswith("0.ckpt + 1.ckpt, 144 crops")
    monkeypatch.setattr("sys.argv", ["syncbn", "test", *words, f"--ckpt_path={paths[0]}"])
    with pytest.raises(ValueError, match="exclude each other"):
        SyncBNCLI()
    monkeypatch.setattr("sys.argv", ["syncbn", "test", *words[:-1], "--model.variant=slim"])
    assert find_preprocessing(SyncBNCLI().datamodule.preprocessing) == find_preprocessing("slim")
