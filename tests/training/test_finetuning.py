"""Fine-tuning under real Trainers: what is frozen stays, what is held waits, and a run is resumed as it was."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint

from ranks import run_ranks
from syncbn.collectives import channel
from syncbn.data import ImageDataModule
from syncbn.data.loading.order import ShuffledOrder
from syncbn.models import inception_bn
from syncbn.nn import estimate_population_statistics
from syncbn.training import GradualUnfreezing, ImageClassifier
from syncbn.training.finetuning.freezing import freeze_network


def make(**options: Any) -> tuple[ImageClassifier, ImageDataModule]:
    """A narrow network, and 40 training images in 5 steps an epoch."""
    seed_everything(0)
    data = ImageDataModule(8, image_size=8, validation_images=9960)
    settings: dict[str, Any] = {
        "width_multiplier": 0.125,
        "stem": "small",
        "learning_rate_per_32_images": 0.1,
    } | options
    return ImageClassifier(8, 10, 1, data.training_images, **settings), data


def fit(module: ImageClassifier, data: ImageDataModule, folder: Path, *callbacks: Callback, **options: Any) -> None:
    fit_options = {name: options.pop(name) for name in ("ckpt_path", "weights_only") if name in options}
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        callbacks=list(callbacks),
        num_sanity_val_steps=0,
        limit_val_batches=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 2, "enable_checkpointing": bool(callbacks)} | options,
    )
    trainer.fit(module, data, **fit_options)


def state_of(module: ImageClassifier) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in module.network.state_dict().items()}


def changed(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, value in before.items() if not torch.equal(value, after[name])}


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
@pytest.mark.parametrize(
    ("options", "constant"),
    [
        ({"batch_norm": "freeze"}, lambda name: ".bn." in name),
        ({"batch_norm": "partial"}, lambda name: ".bn." in name and not name.startswith("stem.conv1.")),
        ({"freeze": ["stem", "inception_3*"]}, lambda name: name.startswith(("stem", "inception_3"))),
        ({"freeze": ["stem", "inception_*"]}, lambda name: not name.startswith("classifier")),
    ],
    ids=["freeze", "partial", "modules", "head only"],
)
def test_what_is_frozen_is_the_same_bit_by_bit(options, constant, tmp_path):
    model, data = make(**options)
    before = state_of(model)
    fit(model, data, tmp_path)
    assert changed(before, state_of(model)) == {name for name in before if not constant(name)}


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_frozen_layers_stay_so_whoever_calls_train():
    model, _ = make(batch_norm="freeze")
    for mode in (True, False, True):
        model.train(mode)
        assert not any(layer.training for name, layer in model.network.named_modules() if name.endswith("bn"))
        assert model.network.classifier.training is mode


def messages(rank: int, patterns: list[str], policy: Any) -> tuple[int, int]:
    net = inception_bn(4, width_multiplier=0.125, stem="small")
    fixed = freeze_network(net, patterns, policy)
    net.train()
    for name in fixed:
        net.get_submodule(name).eval()
    images = torch.randn(2, 3, 16, 16)
    net(images)  # the first message also compares the ranks' layers
    with patch.object(channel, "launch", wraps=channel.launch) as forward:
        loss = net(images).sum()
    with patch.object(channel, "launch", wraps=channel.launch) as backward:
        loss.backward()
    return forward.call_count, backward.call_count


@pytest.mark.parametrize(
    ("patterns", "policy", "count"),
    [([], "train", 33), ([], "partial", 1), ([], "freeze", 0), (["stem", "inception_3*"], "train", 21)],
)
def test_frozen_layers_send_no_message(patterns, policy, count):
    assert run_ranks(messages, 2, patterns, policy) == [(count, count)] * 2


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_estimated_statistics_are_those_of_algorithm_2(tmp_path):
    model, data = make(batch_norm="estimate", estimation_batches=3, freeze=["stem", "inception_*"])
    twin, same = make()
    batches = [batch.images for batch in same.train_dataloader()]
    estimate_population_statistics(twin.network.double().eval(), [batch.double() for batch in batches], 3)
    fit(model, data, tmp_path, precision="64-true")
    expected, found = state_of(twin), state_of(model)
    for name in expected:
        if "running" in name:
            torch.testing.assert_close(found[name], expected[name], msg=name)


class Changes(Callback):
    """What changed in each epoch."""

    def __init__(self) -> None:
        self.by_epoch: list[set[str]] = []

    def on_train_epoch_start(self, trainer, module):
        self.before = state_of(module)

    def on_train_epoch_end(self, trainer, module):
        names = {name for name, _ in module.network.named_parameters()}
        self.by_epoch.append(changed(self.before, state_of(module)) & names)


def test_layers_join_in_at_their_epochs(tmp_path):
    model, data = make(weight_decay=0.1)
    changes = Changes()
    schedule = {1: ["inception_5*"], 2: ["stem", "inception_3*", "inception_4*"]}
    fit(model, data, tmp_path, changes, GradualUnfreezing(schedule), max_epochs=3, gradient_clip_val=1.0)
    names = {name for name, _ in model.network.named_parameters()}
    head = {name for name in names if name.startswith("classifier")}
    last = {name for name in names if name.startswith("inception_5")}
    assert changes.by_epoch == [head, head | last, names]


SCHEDULES = {
    "no epoch": ({}, "must name epochs from 1 on"),
    "the first epoch": ({0: ["stem"]}, "must name epochs from 1 on"),
    "a typing error": ({1: ["stm"]}, "GradualUnfreezing.schedule: the pattern 'stm' matches no"),
    "twice": ({1: ["inception_5*"], 2: ["inception_5a"]}, "inception_5a.* is held until epochs 1 and 2"),
    "frozen for good": ({1: ["stem"]}, "all that 'stem' matches is frozen for good"),
    "everything": ({1: ["inception_*", "classifier"]}, "leaves nothing to train in epoch 0"),
}


@pytest.mark.parametrize(("schedule", "message"), SCHEDULES.values(), ids=SCHEDULES.keys())
def test_senseless_schedules_are_refused(schedule, message, tmp_path):
    model, data = make(freeze=["stem"])
    with pytest.raises(ValueError, match=message):
        fit(model, data, tmp_path, GradualUnfreezing(schedule))


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(
    "options",
    [
        {"batch_norm": "partial", "class_weights": "balanced"},
        {"batch_norm": "estimate", "estimation_batches": 2, "learning_rate_per_32_images": 0.001},
    ],
    ids=["partial", "estimate"],
)
def test_resuming_goes_on_with_the_same_policies(options, tmp_path):
    options |= {"learning_rate_factors": {"classifier": 3.0}}
    schedule = {1: ["inception_5*"], 2: ["stem"]}
    end = {"filename": "{epoch}", "save_top_k": -1, "save_on_train_epoch_end": True}
    model, data = make(**options)
    fit(model, data, tmp_path, GradualUnfreezing(schedule), ModelCheckpoint(tmp_path / "a", **end), max_epochs=3)
    again, data = make(**options)
    fit(
        again,
        data,
        tmp_path,
        GradualUnfreezing(schedule),
        ModelCheckpoint(tmp_path / "b", **end),
        max_epochs=3,
        ckpt_path=str(tmp_path / "a" / "epoch=0.ckpt"),
        weights_only=True,
    )
    assert not changed(state_of(model), state_of(again))


def test_weights_are_loaded_but_for_a_head_of_other_classes(tmp_path):
    model, data = make()
    path = tmp_path / "pretrained.ckpt"
    fit(model, data, tmp_path, ModelCheckpoint(tmp_path, "pretrained"), max_epochs=1)
    [saved] = tmp_path.glob("*.ckpt")
    saved.rename(path)
    tuned = ImageClassifier(8, 3, 1, 40, width_multiplier=0.125, stem="small", weights=str(path))
    assert changed(state_of(model), state_of(tuned)) == {"classifier.weight", "classifier.bias"}
    same = ImageClassifier(8, 10, 1, 40, width_multiplier=0.125, stem="small", weights=str(path))
    assert not changed(state_of(model), state_of(same))
    assert same.hparams["weights"] is None  # a checkpoint of it loads where the file is not


@pytest.mark.filterwarnings("ignore:Found .* in eval mode")
def test_the_order_of_the_data_is_not_disturbed_by_the_estimate(tmp_path):
    """The estimate reads training batches of its own: the run goes on with the first."""
    model, data = make(batch_norm="estimate", estimation_batches=1, learning_rate_per_32_images=0.001)
    seen: list[int] = []

    class Indices(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            seen.extend(batch.indices.tolist())

    fit(model, data, tmp_path, Indices(), max_epochs=1, enable_checkpointing=False)
    assert seen == list(ShuffledOrder(40, 0).samples(0, 0, 40))
