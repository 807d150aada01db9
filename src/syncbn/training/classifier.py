"""Inception-BN as a LightningModule: the loss, the accuracies, the optimiser."""

from typing import Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor

from syncbn.data.batches import ImageBatch
from syncbn.data.samplers import batches_per_epoch, images_of_global_batch
from syncbn.distributed import new_group
from syncbn.models import inception_bn
from syncbn.nn import SyncBatchNorm
from syncbn.training.batch_arithmetic import BatchArithmetic, scale_learning_rate
from syncbn.training.evaluation import Evaluated, log_of_mean
from syncbn.training.parameter_groups import parameter_groups
from syncbn.training.schedules import exponential_schedule


class ImageClassifier(Evaluated):
    """Trains Inception-BN with the recipe of Ioffe & Szegedy 2015, section 4.2.

    One step is one step on the global batch, on any number of ranks: the layers normalise over all ranks, and
    each rank weighs its loss by its number of images, so that the mean over the ranks of its gradient (what
    DistributedDataParallel takes) is the mean over the images of the global batch, also where shares differ. An
    image that could not be read counts as one without a loss.

    Args:
        global_batch_size: Images of one optimiser step, over all ranks.
        num_classes: Classes to tell apart.
        in_channels: Channels of the images.
        training_images: Size of the training set, by which epochs are counted.
        drop_last: Whether the last global batch of an epoch is left out where it is incomplete.
        variant: Of Inception-BN: "paper", "cadene" or "slim".
        norm: "batch", or "none" for the plain Inception.
        activation: "relu" or "sigmoid".
        width_multiplier: Factor on all channel counts.
        stem: "imagenet", or "small" for images of 28 to 64 pixels.
        local_response_norm: GoogLeNet's, in the stem (the paper's Inception and BN-Baseline have it).
        dropout: Probability of dropping a feature before the classifier.
        learning_rate_per_32_images: Initial learning rate for a batch of 32 images; scaled in proportion to
            global_batch_size.
        momentum: Of SGD.
        nesterov: Nesterov's form of the momentum.
        weight_decay: Of the weights of convolutions and linear layers (L2 in the gradient).
        norm_weight_decay: Of gamma and beta.
        bias_weight_decay: Of biases.
        label_smoothing: Share of the target spread over all classes.
        decay_factor: What the learning rate is multiplied by ...
        decay_every: ... every so many epochs or images; need not be whole.
        decay_staircase: In one step each time, rather than smoothly.
        warmup: Epochs or images over which the learning rate first rises linearly from 0.
        schedule_unit: What decay_every and warmup count: "epochs" or "images".
        normalization_batch_size: Images that normalise as one batch, whole ranks of them. Null for all ranks.
        channels_last: Lay out images and weights channels-last, which is faster on most devices.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self,
        global_batch_size: int,
        num_classes: int,
        in_channels: int,
        training_images: int,
        variant: str = "paper",
        norm: str = "batch",
        activation: str = "relu",
        width_multiplier: float = 1.0,
        stem: str = "imagenet",
        local_response_norm: bool = False,
        dropout: float = 0.0,
        learning_rate_per_32_images: float = 0.045,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 1e-4,
        norm_weight_decay: float = 0.0,
        bias_weight_decay: float = 0.0,
        label_smoothing: float = 0.0,
        decay_factor: float = 0.96,
        decay_every: float = 8 / 6,
        decay_staircase: bool = False,
        warmup: float = 0.0,
        schedule_unit: Literal["epochs", "images"] = "epochs",
        normalization_batch_size: int | None = None,
        channels_last: bool = True,
        drop_last: bool = True,
    ) -> None:
        super().__init__(num_classes)
        if norm == "none" and normalization_batch_size is not None:
            raise ValueError(
                f"normalization_batch_size={normalization_batch_size} has no meaning with norm='none': leave it out"
            )
        self.save_hyperparameters()
        self.network = inception_bn(
            num_classes,
            variant,
            norm,
            activation,
            width_multiplier=width_multiplier,
            stem=stem,
            local_response_norm=local_response_norm,
            dropout=dropout,
            in_channels=in_channels,
        )
        if channels_last:
            self.network = self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        steps = batches_per_epoch(training_images, global_batch_size, drop_last)
        images_per_unit = steps * global_batch_size if schedule_unit == "epochs" else 1
        self.learning_rate_factor = exponential_schedule(
            decay_factor,
            decay_every * max(1, images_per_unit),
            warmup=warmup * images_per_unit,
            staircase=decay_staircase,
        )
        self.in_several_groups = False

    def setup(self, stage: str) -> None:
        """Form the groups that normalise together, once the ranks are known."""
        if stage != "fit":
            return
        arithmetic = self.batch_arithmetic(self.trainer)
        self.in_several_groups = arithmetic.ranks_per_normalization < arithmetic.num_ranks
        if self.in_several_groups:
            group = new_group(arithmetic.ranks_per_normalization)
            for layer in self.network.modules():
                if isinstance(layer, SyncBatchNorm):
                    layer.process_group = group

    def batch_arithmetic(self, trainer: Trainer) -> BatchArithmetic:
        """What the global batch size comes to with a trainer."""
        return BatchArithmetic(
            global_batch_size=self.hparams["global_batch_size"],
            num_ranks=trainer.world_size,
            accumulate_grad_batches=trainer.accumulate_grad_batches,
            learning_rate_per_32_images=self.hparams["learning_rate_per_32_images"],
            normalization_batch_size=self.hparams["normalization_batch_size"],
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits, shape (N, num_classes), of normalised images, shape (N, C, H, W)."""
        if self.hparams["channels_last"]:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.network(images)

    def log_probabilities(self, images: Tensor) -> Tensor:
        """Logarithm of the mean over the crops of the class probabilities.

        Args:
            images: Normalised, shape (N, C, H, W), or (N, K, C, H, W) with K crops of each image.

        Returns:
            Shape (N, num_classes).
        """
        if images.ndim == 4:
            return self(images).log_softmax(1)
        of_crops = self(images.flatten(0, 1)).log_softmax(1)
        return log_of_mean(of_crops.unflatten(0, images.shape[:2]).unbind(1))

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        """This rank's part of the loss: the mean over the ranks is the mean over the images of the global batch."""
        logits = self(batch.images)
        top1 = self._metric("train_top1")
        if len(batch.labels):
            loss = F.cross_entropy(logits, batch.labels, label_smoothing=self.hparams["label_smoothing"])
            loss = loss * self._weight_of_share(len(batch.labels), batch_idx)
            top1.update(logits.detach(), batch.labels)
        else:
            loss = logits.sum()  # 0, and of the same graph: this rank takes part in every exchange
        self.log("train_loss", loss.detach(), prog_bar=True, sync_dist=True)
        self.log("train_top1", top1, on_step=False, on_epoch=True)
        self.log("learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"], rank_zero_only=True)
        return loss

    def _weight_of_share(self, images: int, batch_idx: int) -> float:
        """This rank's images in a batch, relative to an equal share of the global batch; 1 as a rule."""
        options = self.hparams
        accumulated = self.trainer.accumulate_grad_batches
        step = batch_idx // accumulated
        of_step = images_of_global_batch(step, options["training_images"], options["global_batch_size"])
        if of_step < 1:
            raise ValueError(
                f"training_images={options['training_images']} end before step {step} of an epoch with"
                f" global_batch_size={options['global_batch_size']}: give the model the size of the training set"
            )
        return images * self.trainer.world_size * accumulated / of_step

    def on_validation_start(self) -> None:
        """Where ranks normalise in several groups, make their running statistics one: the mean over the ranks."""
        if not self.in_several_groups or self.trainer.sanity_checking:
            return
        for layer in self.network.modules():
            if isinstance(layer, SyncBatchNorm) and layer.track_running_stats:
                for buffer in (layer.running_mean, layer.running_var):
                    assert isinstance(buffer, Tensor)
                    buffer.copy_(self.trainer.strategy.reduce(buffer.clone(), reduce_op="mean"))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD with momentum over the parameter groups; the schedule steps with the optimiser."""
        options = self.hparams
        optimizer = torch.optim.SGD(
            parameter_groups(
                self.network,
                options["weight_decay"],
                norm_weight_decay=options["norm_weight_decay"],
                bias_weight_decay=options["bias_weight_decay"],
            ),
            lr=scale_learning_rate(options["learning_rate_per_32_images"], options["global_batch_size"]),
            momentum=options["momentum"],
            nesterov=options["nesterov"],
        )
        batch_size = options["global_batch_size"]
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda steps: self.learning_rate_factor(steps * batch_size)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
