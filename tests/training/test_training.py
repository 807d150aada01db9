"""ImageClassifier under real Trainers: averages by sample, resuming, Polyak averaging, checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from syncbn.data import ImageDataModule
from syncbn.training import ImageClassifier, PolyakAveraging


class Losses(Callback):
    """The loss of every step, by the number of the step."""

    def __init__(self) -> None:
        self.by_step: dict[int, float] = {}

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, outputs: Any, *_: Any) -> None:
        self.by_step[trainer.global_step] = float(outputs["loss"])


def make(**options: Any) -> tuple[ImageClassifier, ImageDataModule]:
    """A narrow network, and 50 training images in 6 steps an epoch."""
    seed_everything(0)
    data = ImageDataModule(8, image_size=8, validation_images=9950, seed=0)
    settings = {"width_multiplier": 0.125, "stem": "small", "learning_rate_per_32_images": 0.01} | options
    return ImageClassifier(8, 10, 1, data.training_images, **settings), data


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    settings: dict[str, Any] = {"max_epochs": 2, "limit_val_batches": 2, "limit_test_batches": 2} | options
    return Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        callbacks=list(callbacks),
        num_sanity_val_steps=0,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )


def every_checkpoint(folder: Path) -> list[Callback]:
    """A checkpoint in the middle of an epoch, at its validation, and after it."""
    every: dict[str, Any] = {"dirpath": folder, "save_top_k": -1}
    return [
        ModelCheckpoint(filename="{step}", every_n_train_steps=4, **every),
        ModelCheckpoint(filename="validation-{epoch}", **every),
        ModelCheckpoint(filename="end-{epoch}", mode="max", save_on_train_epoch_end=True, **every),
    ]


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """A run of two epochs without interruption, its losses and its checkpoints."""
    folder = tmp_path_factory.mktemp("whole")
    losses = Losses()
    model, data = make()
    trainer(folder, losses, *every_checkpoint(folder)).fit(model, data)
    return folder, losses.by_step, model.state_dict()


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # of the resumed run's own checkpoints
@pytest.mark.parametrize(
    ("checkpoint", "first_step"), [("step=4", 5), ("step=8", 9), ("validation-epoch=0", 7), ("end-epoch=0", 7)]
)
def test_resuming_goes_on_where_it_stopped(whole_run, tmp_path, checkpoint, first_step):
    folder, expected, state = whole_run
    assert sorted(expected) == list(range(1, 13))
    losses = Losses()
    model, data = make()
    trainer(tmp_path, losses, *every_checkpoint(tmp_path)).fit(
        model, data, ckpt_path=str(folder / f"{checkpoint}.ckpt"), weights_only=True
    )
    assert losses.by_step == {step: loss for step, loss in expected.items() if step >= first_step}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_accuracy_and_loss_are_averaged_by_sample(tmp_path):
    model, data = make()
    data.sets.validation.indices = data.sets.validation.indices[:21]  # batches of 8, 8 and 5
    run = trainer(tmp_path, limit_val_batches=1.0, precision="64-true")
    [metrics] = run.validate(model, data, verbose=False)
    batches = list(data.val_dataloader())
    with torch.no_grad():
        logits = torch.cat([model.eval()(batch.images.double()) for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    assert len(labels) == 21
    assert metrics["val_top1"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    hits = (logits.topk(5).indices == labels[:, None]).any(1)
    assert metrics["val_top5"] == pytest.approx(float(hits.float().mean()))
    assert metrics["val_loss"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-5
    )  # a mean in float32


def test_accumulating_takes_the_same_samples(tmp_path):
    """Without BatchNorm, which sees smaller batches, the parts of a batch add up to the batch."""
    results = []
    for accumulate in (1, 2):
        model, data = make(norm="none", learning_rate_per_32_images=0.1)
        trainer(
            tmp_path, accumulate_grad_batches=accumulate, max_epochs=1, precision="64-true", enable_checkpointing=False
        ).fit(model, data)
        results.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


def test_learning_rate_follows_the_schedule_in_every_step(tmp_path):
    seen = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            seen.append(trainer.optimizers[0].param_groups[0]["lr"])

    model, data = make(decay_factor=0.5, decay_every=0.5, warmup=1 / 3)  # 6 steps an epoch
    trainer(tmp_path, Rates(), max_epochs=1, enable_checkpointing=False).fit(model, data)
    expected = [0.0025 * min(1, step / 2) * 0.5 ** (step / 3) for step in range(6)]
    assert seen == pytest.approx(expected)


def test_polyak_average_is_what_is_validated_saved_and_tested(tmp_path):
    model, data = make(learning_rate_per_32_images=0.1)
    last = ModelCheckpoint(tmp_path)
    averaging = PolyakAveraging(decay=0.9)
    run = trainer(tmp_path, averaging, last)
    run.fit(model, data)
    average = {name: value.clone() for name, value in averaging._average_model.module.state_dict().items()}
    checkpoint = torch.load(last.best_model_path, weights_only=True)
    name = "network.classifier.weight"
    assert torch.equal(checkpoint["state_dict"][name], average[name])
    assert not torch.equal(checkpoint["current_model_state"][name], average[name])
    [tested] = run.test(model, data, ckpt_path=last.best_model_path, verbose=False, weights_only=True)
    assert torch.equal(model.state_dict()[name], average[name])
    alone, data = make()
    alone.load_state_dict(checkpoint["state_dict"])
    [expected] = trainer(tmp_path).test(alone, data, verbose=False)
    assert tested == pytest.approx(expected)


@pytest.mark.parametrize("decay", [-0.1, 1.1])
def test_polyak_decay_out_of_range_is_refused(decay):
    with pytest.raises(ValueError, match="decay="):
        PolyakAveraging(decay)


def test_a_checkpoint_holds_no_code_and_builds_the_network_again(tmp_path, whole_run):
    folder, _, state = whole_run
    checkpoint = torch.load(folder / "end-epoch=1.ckpt", weights_only=True)
    assert checkpoint["hyper_parameters"]["width_multiplier"] == 0.125
    model = ImageClassifier.load_from_checkpoint(folder / "end-epoch=1.ckpt", weights_only=True)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.filterwarnings("ignore:You are using a custom batch sampler")
def test_weights_that_are_not_finite_are_not_evaluated(tmp_path):
    model, data = make()
    with torch.no_grad():
        model.network.classifier.bias[2] = float("nan")
    for verb in ("test", "validate", "predict"):
        with pytest.raises(ValueError, match=r"^1 of 10 values of network.classifier.bias are not finite"):
            getattr(trainer(tmp_path), verb)(model, data)
