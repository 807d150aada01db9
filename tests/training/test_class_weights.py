"""Class weights: where they come from, and that the loss is the weighted mean over the global batch."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, Trainer, seed_everything

from syncbn.data import ImageDataModule
from syncbn.training import ImageClassifier
from syncbn.training.optimization.class_weights import balanced_weights, given_weights


def test_balanced_weights_give_every_class_the_same_say():
    counts = [10, 40, 50]
    weights = balanced_weights(counts, ["a", "b", "c"])
    shares = weights * torch.tensor(counts)
    torch.testing.assert_close(shares, torch.full((3,), 100 / 3))


def test_a_class_without_images_is_named():
    with pytest.raises(ValueError, match="1 of 2 classes have no training image, such as 'b'"):
        balanced_weights([3, 0], ["a", "b"])


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "has 1 weights, the data have 2 classes"),
        ([1.0, 0.0], "must be positive"),
        ([1.0, float("nan")], "must be positive"),
        ([1.0, float("inf")], "must be positive"),
    ],
)
def test_senseless_weights_are_refused(weights, message):
    with pytest.raises(ValueError, match=message):
        given_weights(weights, 2)


class Step(Callback):
    """The first batch with the loss that the module gave it."""

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.loss, self.batch = outputs["loss"].detach(), batch


def fit(class_weights, folder, **options):
    seed_everything(0)
    data = ImageDataModule(32, image_size=8, validation_images=9900)
    model = ImageClassifier(
        32, 10, 1, 100, width_multiplier=0.125, stem="small", class_weights=class_weights, label_smoothing=0.2
    )
    step = Step()
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        max_steps=1,
        precision="64-true",
        callbacks=[step],
        **options,
    )
    trainer.fit(model, data)
    return model, data, step


@pytest.mark.parametrize("class_weights", ["balanced", [1.0, 2, 3, 4, 5, 6, 7, 8, 9, 10]])
def test_the_loss_is_torch_s_weighted_mean(class_weights, tmp_path):
    model, data, step = fit(class_weights, tmp_path)
    labels = torch.tensor([data.sets.train.label(index) for index in range(100)])
    counts = labels.bincount(minlength=10)
    assert data.class_counts() == counts.tolist()
    weights = 100 / (10 * counts) if class_weights == "balanced" else torch.tensor(class_weights)
    torch.testing.assert_close(model.class_weights, weights, check_dtype=False)
    seed_everything(0)
    twin = ImageClassifier(32, 10, 1, 100, width_multiplier=0.125, stem="small").double().train()
    expected = F.cross_entropy(twin(step.batch.images), step.batch.labels, weights.double(), label_smoothing=0.2)
    torch.testing.assert_close(step.loss, expected.detach())
    assert "class_weights" not in model.state_dict()


def test_accumulation_is_refused(tmp_path):
    with pytest.raises(ValueError, match="class_weights needs accumulate_grad_batches=1, not 2"):
        fit("balanced", tmp_path, accumulate_grad_batches=2)
