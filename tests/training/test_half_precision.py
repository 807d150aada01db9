"""With precision=bf16-true and 16-true, which cast the module, figures are those of float32."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from syncbn.training import ImageClassifier
from syncbn.training.evaluation import accuracy_metrics
from syncbn.training.optimization.polyak import PolyakAveraging

CASTS = {
    "to": lambda module: module.to(torch.bfloat16),
    "method": lambda module: module.bfloat16(),
    "float16": lambda module: module.to(torch.float16),
    "within": lambda module: nn.Sequential(module).to(torch.bfloat16)[0],
}


@pytest.mark.parametrize("cast", CASTS)
def test_counts_and_losses_are_summed_in_full(cast):
    metrics = CASTS[cast](accuracy_metrics(10))
    for _ in range(2):  # the second time from what reset() restores
        for _ in range(300):
            metrics["val_images"].update(7)
            metrics["val_loss"].update(torch.tensor(2.3), weight=7)
        assert metrics["val_images"].compute() == 2100
        assert metrics["val_loss"].compute() == pytest.approx(2.3, rel=1e-5)
        metrics["val_images"].reset(), metrics["val_loss"].reset()


def test_wider_states_stay_as_they_are_asked_for():
    metric = accuracy_metrics(10).to(torch.float64)["val_loss"]
    assert metric.mean_value.dtype == torch.float64


def test_class_weights_are_not_rounded():
    model = ImageClassifier(32, 3, 1, 32, width_multiplier=0.0625, stem="small", class_weights=[1.001, 0.3, 2.7])
    model.to(torch.bfloat16)
    model.trainer = type("Trainer", (), {"world_size": 1})()
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, 0])
    expected = F.cross_entropy(logits, labels, torch.tensor([1.001, 0.3, 2.7]))
    torch.testing.assert_close(model._loss(logits, labels, 0), expected)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_averages_of_weights_in_half_precision_are_refused(precision):
    trainer = type("Trainer", (), {"precision": precision})()
    with pytest.raises(ValueError, match=f"PolyakAveraging.*precision={precision}.*-mixed"):
        PolyakAveraging().setup(trainer, nn.Identity(), "fit")
