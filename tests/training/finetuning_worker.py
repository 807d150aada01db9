"""Fine-tunes a narrow network for a few steps on P ranks, in double precision, once for each policy.

Usage: ``finetuning_worker.py RANKS OUTPUT.json`` on each rank; rank 0 writes, for each policy, the loss of every step
over the global batch, norms of the parameters and running statistics, the validation's metrics and confusion matrix.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from invariance_worker import LossCurve
from lightning.pytorch import Callback, Trainer, seed_everything

from syncbn.data import Augmentation, ImageDataModule
from syncbn.data.loading.order import ShuffledOrder
from syncbn.training import ClassReport, GradualUnfreezing, ImageClassifier, SynchronisedDDPStrategy

GLOBAL_BATCH_SIZE = 32
CLASS_WEIGHTS = [1.0, 5.0, 0.2, 1.0, 3.0, 0.5, 1.0, 1.0, 7.0, 0.1]

POLICIES: dict[str, dict[str, Any]] = {
    "weighted": {"class_weights": CLASS_WEIGHTS, "label_smoothing": 0.1, "learning_rate_factors": {"stem": 0.1}},
    "partial": {"batch_norm": "partial", "freeze": ["inception_3a"]},
    "estimate": {"batch_norm": "estimate", "estimation_batches": 3},
    "gradual": {"batch_norm": "freeze"},
    "embedding": {"embedding_dimension": 6},
}


def train(num_ranks: int, policy: str, folder: Path) -> dict[str, Any]:
    """Four steps in two epochs; returns what the ranks' number must not change."""
    seed_everything(1)
    data = ImageDataModule(
        GLOBAL_BATCH_SIZE, image_size=8, augmentation=Augmentation(), validation_images=33, drop_last=False, seed=1
    )
    data.sets.train.indices = data.sets.train.indices[::180]  # 56 images: the second batch is short
    data.order = ShuffledOrder(56, seed=1)
    model = ImageClassifier(
        GLOBAL_BATCH_SIZE,
        10,
        1,
        data.training_images,
        width_multiplier=0.125,
        stem="small",
        learning_rate_per_32_images=0.002,
        drop_last=False,
        **POLICIES[policy],
    )
    curve = LossCurve()
    callbacks: list[Callback] = [curve]
    if policy != "embedding":
        callbacks.append(ClassReport(str(folder / policy)))
    if policy == "gradual":
        callbacks.append(GradualUnfreezing({1: ["stem", "inception_*"]}))
    trainer = Trainer(
        accelerator="cpu",
        devices=num_ranks,
        strategy=SynchronisedDDPStrategy(timeout_seconds=60),
        precision="64-true",
        max_epochs=2,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, data)
    state = model.network.state_dict()
    return {
        "losses": curve.losses,
        "state": {name: float(value.double().norm()) for name, value in state.items()},
        "validation": {name: float(v) for name, v in trainer.callback_metrics.items() if name.startswith("val_")},
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    ranks, output = int(sys.argv[1]), Path(sys.argv[2])
    results = {policy: train(ranks, policy, output.with_suffix("")) for policy in POLICIES}
    if torch.distributed.get_rank() == 0:
        output.write_text(json.dumps(results))
