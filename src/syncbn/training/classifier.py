"""Inception-BN as a LightningModule: the loss, the accuracies, the optimiser."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from syncbn.collectives.groups import new_group
from syncbn.collectives.world import sum_over_world
from syncbn.data.datamodule import ImageDataModule
from syncbn.data.datasets.formats import Stage
from syncbn.data.loading.batches import ImageBatch
from syncbn.data.loading.samplers import batches_per_epoch, images_of_global_batch
from syncbn.models import inception_bn
from syncbn.models.embedding import embed, put_proxy_head
from syncbn.models.weights import HeadPolicy
from syncbn.models.weights.card import CARD_KEY
from syncbn.nn import SyncBatchNorm, estimate_population_statistics
from syncbn.ops import as_statistic
from syncbn.training.batch_arithmetic import BatchArithmetic, scale_learning_rate
from syncbn.training.checkpoints.rank_state import add_rank_state, take_rank_state
from syncbn.training.checkpoints.trained_classes import TRAINED_CLASSES, classes_of, follow_classes
from syncbn.training.evaluation import Evaluated, log_of_mean
from syncbn.training.finetuning.freezing import BatchNormPolicy, freeze_network
from syncbn.training.finetuning.retrieval import NEIGHBOURS, RecallAtK
from syncbn.training.finetuning.starting_weights import (
    checked_variant_options,
    forget_weights,
    make_card,
    options_of_weights,
    take_embedding,
    weights_to_start_from,
)
from syncbn.training.optimization.class_weights import balanced_weights, given_weights
from syncbn.training.optimization.parameter_groups import parameter_groups, scale_groups
from syncbn.training.optimization.schedules import exponential_schedule
from syncbn.training.optimization.speed import CompileMode, compile_network, use_fused_optimizer, use_recomputation


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
        weights: File of weights to start from, as `inception_bn` takes it; options left at their defaults follow it.
        variant_options: Further arguments of `inception_bn`, which replace attributes of the variant (eps ...).
        preprocessing: What the network is fed: colour_order, mean, std. Null for that of the weights or the variant.
        variant: Of Inception-BN: "paper", "cadene" or "slim".
        norm: "batch", or "none" for the plain Inception.
        activation: "relu" or "sigmoid".
        width_multiplier: Factor on all channel counts.
        stem: "imagenet", or "small" for images of 28 to 64 pixels.
        local_response_norm: GoogLeNet's, in the stem (the paper's Inception and BN-Baseline have it).
        dropout: Probability of dropping a feature before the classifier.
        per_activation_head: Size of the training images in pixels, to normalise each activation of the last module
            by itself (section 4.2.3, for the ensemble). Null normalises each feature map.
        init_scale: Factor on the initial weights of the convolutions (section 4.2.3, for the ensemble).
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
        fused_optimizer: Update all parameters in one kernel. Null does so on CUDA devices.
        recompute_activations: Keep only the inputs of BatchNorm for the backward, which makes the outputs again:
            about half the memory of a step (counted on a CPU) for some percent of its time (predicted for GPUs: 7).
            Null does so on CUDA devices. See `syncbn.recompute_activations`.
        compile: Mode of torch.compile, which makes one graph of the network in training: "default",
            "reduce-overhead" (CUDA graphs, for small batches), "max-autotune". Null runs the layers one by one.
        freeze: What is not trained: patterns of names of parameters or modules, such as "stem" or "inception_3*". A
            BatchNorm layer within it keeps its statistics, too.
        batch_norm: Of the other BatchNorm layers: "train"; "freeze", which keeps statistics, gammas and betas;
            "partial", "freeze" for all but the first; or "estimate", which estimates the statistics anew on the
            training images before the first step, then keeps them.
        estimation_batches: Global batches of "estimate", at most those of an epoch.
        learning_rate_factors: From a pattern to a factor on the learning rate of what it matches; of several that
            match, the last counts.
        class_weights: Of each class in the training loss, a weighted mean over the global batch; or "balanced", which
            gives the classes the same say whatever their numbers of images. Null for equal weights.
        embedding_dimension: Train an embedding for retrieval: average plus maximum over the positions, a linear map to
            this many numbers, L2 norm 1, by the normalised softmax loss. Null for a classifier.
        embedding_temperature: Of the normalised softmax loss.
        head: What is done with the classifier of ``weights``. "auto" takes it over where its classes are called as the
            data's; of a file without names, where their number is the same. "new" draws a new one, "keep" takes it
            over whatever its classes are called. With ``embedding_dimension`` the same of the embedding of ``weights``,
            by its shape.
        classes: Names of the classes, in the order of their labels.

    Raises:
        ValueError: An argument is out of range, a pattern matches nothing, or arguments contradict each other.
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
        per_activation_head: int | None = None,
        init_scale: float = 1.0,
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
        fused_optimizer: bool | None = None,
        recompute_activations: bool | None = None,
        compile: CompileMode | None = None,
        drop_last: bool = True,
        weights: str | None = None,
        freeze: list[str] | None = None,
        batch_norm: BatchNormPolicy = "train",
        estimation_batches: int = 100,
        learning_rate_factors: dict[str, float] | None = None,
        class_weights: list[float] | Literal["balanced"] | None = None,
        embedding_dimension: int | None = None,
        embedding_temperature: float = 0.05,
        variant_options: dict[str, Any] | None = None,
        preprocessing: dict[str, Any] | None = None,
        head: HeadPolicy = "auto",
        classes: tuple[str, ...] | None = None,
    ) -> None:
        super().__init__(num_classes)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing} must be in [0, 1)")
        if norm == "none" and normalization_batch_size is not None:
            raise ValueError(
                f"normalization_batch_size={normalization_batch_size} has no meaning with norm='none': leave it out"
            )
        self.save_hyperparameters(ignore=["classes"])  # which the model card holds
        embeds = embedding_dimension is not None
        start = None if weights is None else weights_to_start_from(weights, classes or num_classes, head, embeds)
        self.network = inception_bn(
            num_classes,
            variant,
            norm,
            activation,
            width_multiplier=width_multiplier,
            stem=stem,
            local_response_norm=local_response_norm,
            dropout=dropout,
            per_activation_head=per_activation_head,
            init_scale=init_scale,
            in_channels=in_channels,
            weights=start,
            **checked_variant_options(variant_options),
        )
        if start is not None:  # a checkpoint of this run then needs the file no more
            self.hparams.update(options_of_weights(self.network, start.card, preprocessing))
        self.recall = nn.ModuleDict()
        if embedding_dimension is not None:
            put_proxy_head(self.network, num_classes, embedding_dimension, embedding_temperature)
            if start is not None:
                take_embedding(self.network, start, head)
            self.recall = nn.ModuleDict({stage: RecallAtK() for stage in ("val", "test")})
        forget_weights()
        self.fixed_statistics = freeze_network(self.network, freeze or [], batch_norm)
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
        self.trained_classes: tuple[str, ...] | None = None  # of a checkpoint that is loaded, where it names them
        self.class_weights: Tensor | None = None  # no buffer, which precision=bf16-true would round
        if isinstance(class_weights, list):
            self.class_weights = given_weights(class_weights, num_classes)
        self.train()  # but for the layers whose statistics are fixed

    def setup(self, stage: str) -> None:
        """Form the groups that normalise together, once the ranks are known; weigh the classes, once the data are."""
        if stage != "fit":
            return
        self._set_up_class_weights()
        arithmetic = self.batch_arithmetic(self.trainer)
        self.in_several_groups = arithmetic.ranks_per_normalization < arithmetic.num_ranks
        if self.in_several_groups:
            group = new_group(arithmetic.ranks_per_normalization)
            for layer in self.network.modules():
                if isinstance(layer, SyncBatchNorm):
                    layer.process_group = group

    def _set_up_class_weights(self) -> None:
        weights, trainer = self.hparams["class_weights"], self.trainer
        if weights is not None and trainer.accumulate_grad_batches > 1:
            raise ValueError(
                f"class_weights needs accumulate_grad_batches=1, not {trainer.accumulate_grad_batches}: the sum of the"
                " weights of a global batch is known only when all of it has passed"
            )
        if weights == "balanced":
            data = self._data("class_weights='balanced'")
            self.class_weights = balanced_weights(data.class_counts(), data.classes)

    def _data(self, option: str) -> ImageDataModule:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, ImageDataModule):
            raise ValueError(f"{option} looks at the training images: give the trainer an ImageDataModule")
        return data

    def train(self, mode: bool = True) -> "ImageClassifier":
        """Switch between training and evaluation; BatchNorm layers whose statistics are fixed stay in evaluation."""
        super().train(mode)
        for name in self.fixed_statistics:
            self.network.get_submodule(name).eval()
        return self

    def on_train_start(self) -> None:
        """Estimate the statistics of BatchNorm where ``batch_norm`` says so and the run is a new one; then compile."""
        if self.hparams["batch_norm"] == "estimate" and self.trainer.global_step == 0:
            self._estimate_statistics()
        device = self.trainer.strategy.root_device
        self.network.recompute_activations = use_recomputation(self.hparams["recompute_activations"], device)
        compile_network(self.network, self.hparams["compile"], device)

    def _estimate_statistics(self) -> None:
        loader, precision = self._data("batch_norm='estimate'").train_dataloader(), self.trainer.precision_plugin
        batches = (precision.convert_input(batch) for batch in loader)
        self.eval()  # or the layers that are fixed would be left out
        with precision.forward_context():
            estimate_population_statistics(self.network, batches, min(self.hparams["estimation_batches"], len(loader)))
        self.train()

    @property
    def logged(self) -> list[str]:
        """Names of the metrics of a fit, for callbacks that look at one."""
        evaluated = [f"val_recall_at_{neighbours}" for neighbours in NEIGHBOURS] if self.recall else self.metrics
        return ["train_loss", "train_top1", "learning_rate", *(name for name in evaluated if name.startswith("val_"))]

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
        """Logits, shape (N, num_classes), float32 or wider, of normalised images, shape (N, C, H, W)."""
        if self.hparams["channels_last"]:
            images = images.contiguous(memory_format=torch.channels_last)
        return _float32_or_wider(self.network(images))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what differs between ranks, and the model card.

        By that `syncbn predict` and others use the weights with no config.
        """
        datamodule = getattr(self._trainer, "datamodule", None)  # self.trainer raises where there is none
        if isinstance(datamodule, ImageDataModule):
            checkpoint[CARD_KEY] = make_card(self.network, datamodule).to_json()
            if self.recall:  # the card of an embedding names no classes
                checkpoint[TRAINED_CLASSES] = list(datamodule.classes)
        if self._trainer is not None and self._trainer.state.fn == TrainerFn.FITTING:
            add_rank_state(self, checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Compare its classes with the data's; to go on training, take what was not the same on all ranks."""
        self.trained_classes = classes_of(checkpoint)
        if self._trainer is None:
            return
        follow_classes(self._trainer, self.trained_classes, embeds=bool(self.recall))
        if self._trainer.state.fn == TrainerFn.FITTING:
            self._set_up_class_weights()  # their order may be another now
            take_rank_state(self, checkpoint, self.trainer.global_rank, self.trainer.world_size)

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
        loss = self._loss(logits, batch.labels, batch_idx)
        top1 = self._metric("train_top1")
        if len(batch.labels):
            top1.update(logits.detach(), batch.labels)
        self.log("train_loss", loss.detach(), prog_bar=True, sync_dist=True)
        self.log("train_top1", top1, on_step=False, on_epoch=True)
        self.log("learning_rate", self.trainer.optimizers[0].param_groups[0]["lr"], rank_zero_only=True)
        return loss

    def _loss(self, logits: Tensor, labels: Tensor, batch_idx: int) -> Tensor:
        smoothing, weights = self.hparams["label_smoothing"], self.class_weights
        if weights is not None:
            # As torch's mean, but over the global batch: DDP takes the mean over the ranks.
            weights = self.class_weights = weights.to(logits)
            total = sum_over_world(as_statistic(weights[labels].sum()))
            loss = F.cross_entropy(logits, labels, weights, label_smoothing=smoothing, reduction="sum")
            scaled = as_statistic(loss * self.trainer.world_size)
            return (scaled / total.clamp(min=torch.finfo(total.dtype).tiny)).to(loss.dtype).to(loss.device)
        if not len(labels):
            return logits.sum()  # 0, and of the same graph: this rank takes part in every exchange
        loss = F.cross_entropy(logits, labels, label_smoothing=smoothing)
        return loss * self._weight_of_share(len(labels), batch_idx)

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
        super().on_validation_start()
        if not self.in_several_groups or self.trainer.sanity_checking:
            return
        for name, layer in self.network.named_modules():
            if isinstance(layer, SyncBatchNorm) and layer.track_running_stats and name not in self.fixed_statistics:
                for buffer in (layer.running_mean, layer.running_var):
                    assert isinstance(buffer, Tensor)
                    buffer.copy_(self.trainer.strategy.reduce(buffer.clone(), reduce_op="mean"))

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """SGD with momentum over the parameter groups; the schedule steps with the optimiser."""
        options = self.hparams
        learning_rate = scale_learning_rate(options["learning_rate_per_32_images"], options["global_batch_size"])
        groups = parameter_groups(
            self.network,
            options["weight_decay"],
            norm_weight_decay=options["norm_weight_decay"],
            bias_weight_decay=options["bias_weight_decay"],
        )
        optimizer = torch.optim.SGD(
            scale_groups(groups, self.network, options["learning_rate_factors"] or {}, learning_rate),
            lr=learning_rate,
            momentum=options["momentum"],
            nesterov=options["nesterov"],
            fused=use_fused_optimizer(options["fused_optimizer"], self.network.parameters(), self.trainer),
        )
        batch_size = options["global_batch_size"]
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda steps: self.learning_rate_factor(steps * batch_size)
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def predict_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Tensor]:
        """Class probabilities, as of any `Evaluated`.

        Raises:
            ValueError: An embedding is trained, which has none.
        """
        if self.recall:
            raise ValueError(
                "an embedding has no class probabilities to predict: `syncbn predict CKPT IMAGES` gives its numbers"
            )
        return super().predict_step(batch, batch_idx)

    def _evaluate(self, stage: Stage, batch: ImageBatch) -> Tensor | None:
        """Of an embedding, keep this rank's embeddings: its classes may be others than those of the training."""
        if not self.recall:
            return super()._evaluate(stage, batch)
        if batch.images.ndim != 4:
            raise ValueError("an embedding is evaluated on one crop of an image: leave data.evaluation_crops at 1")
        dimension = self.hparams["embedding_dimension"]
        images = batch.images
        embeddings = _float32_or_wider(embed(self.network, images)) if len(images) else images.new_zeros(0, dimension)
        metric: Any = self.recall[stage]
        metric.update(embeddings, batch.labels)
        self._metric(f"{stage}_images").update(len(images))
        return None

    def _log_evaluation(self, stage: Stage) -> None:
        if not self.recall:
            super()._log_evaluation(stage)
            return
        metric: Any = self.recall[stage]
        logger = self._to_loggers()
        self.log(f"{stage}_images", self._metric(f"{stage}_images"), logger=logger)
        for neighbours, recall in metric.compute().items():
            # The same on all ranks; sync_dist says so to Lightning, which would warn.
            name = f"{stage}_recall_at_{neighbours}"
            self.log(name, recall.float(), prog_bar=neighbours == 1, sync_dist=True, logger=logger)
        metric.reset()


def _float32_or_wider(values: Tensor) -> Tensor:
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
