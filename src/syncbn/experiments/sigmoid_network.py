"""The experiment of section 4.1: a network of sigmoid layers on MNIST, trained with and without BatchNorm.

The network is so small that a step costs less than the bookkeeping of a general trainer would. Hence the plain loop
here, over data in memory.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from syncbn.collectives.world import sum_over_world
from syncbn.data.datasets.array import ArrayDataset
from syncbn.data.datasets.formats import open_image_sets
from syncbn.data.loading.order import epoch_order
from syncbn.data.loading.samplers import batches_per_epoch, part_of_range, split_global_batch
from syncbn.experiments.provenance import UNKNOWN
from syncbn.files import atomic_file
from syncbn.nn import SyncBatchNorm
from syncbn.training.monitoring.covariate_shift import InputRecorder, distribution
from syncbn.training.run.folder import source_revision
from syncbn.training.strategies.ddp import BUFFER_OPTION

HIDDEN_LAYERS, HIDDEN_UNITS, CLASSES = 3, 100, 10
STEPS_BETWEEN_CHECKPOINTS = 5_000


@dataclass(frozen=True)
class Run:
    """One training run of the experiment.

    Attributes:
        batch_norm: Whether each hidden layer is normalised.
        learning_rate: Of plain SGD (the paper does not state the optimiser).
        weight_std: Standard deviation of the initial weights ("small random Gaussian values").
        seed: Of the initial weights and of the order of the samples.
        ranks: Processes among which each mini-batch is divided.
        steps: Of SGD.
        batch_size: Of a mini-batch, over all ranks.
        evaluate_every: Steps from one evaluation to the next.
        precision: "float32" or "float64".
    """

    batch_norm: bool
    learning_rate: float
    weight_std: float
    seed: int
    ranks: int
    steps: int
    batch_size: int
    evaluate_every: int
    precision: str

    @property
    def name(self) -> str:
        """What tells a run from the others of one experiment."""
        network = "batch-norm" if self.batch_norm else "plain"
        return f"{network}-lr{self.learning_rate:g}-std{self.weight_std:g}-seed{self.seed}-ranks{self.ranks}"


@dataclass
class Curves:
    """What T evaluations found, each on all test images in evaluation mode.

    Attributes:
        steps: After how many steps: int64, shape (T,).
        accuracy: Top-1, in 0..1: float64, shape (T,).
        loss: Cross-entropy: float64, shape (T,).
        percentiles: {15, 50, 85}th of the input to each sigmoid of the last hidden layer: float64, shape (T, 3, 100).

    What was found when the loss was not finite any more, and after that, is NaN.
    """

    steps: Tensor
    accuracy: Tensor
    loss: Tensor
    percentiles: Tensor

    @classmethod
    def empty(cls) -> "Curves":
        """No evaluation yet."""
        double = torch.float64
        return cls(
            torch.empty(0, dtype=torch.int64),
            torch.empty(0, dtype=double),
            torch.empty(0, dtype=double),
            torch.empty(0, 3, HIDDEN_UNITS, dtype=double),
        )

    @property
    def diverged_at(self) -> int | None:
        """The first step at which the loss was found not to be finite; None if there is none."""
        diverged = self.steps[self.loss.isnan()]
        return int(diverged[0]) if len(diverged) else None

    def append(self, step: int, accuracy: float, loss: float, percentiles: Any) -> None:
        """Add an evaluation."""
        new = Curves(
            torch.tensor([step]),
            torch.tensor([accuracy], dtype=torch.float64),
            torch.tensor([loss], dtype=torch.float64),
            torch.as_tensor(percentiles, dtype=torch.float64)[None],
        )
        for name in vars(self):
            setattr(self, name, torch.cat([getattr(self, name), getattr(new, name)]))


@dataclass(frozen=True)
class Digits:
    """Binary images and their labels.

    Attributes:
        images: 0 or 1, uint8, shape (N, H * W).
        labels: int64, shape (N,).
    """

    images: Tensor
    labels: Tensor


def load_digits(folder: Path, threshold: int) -> tuple[Digits, Digits]:
    """Training and test images of a folder of idx files.

    Args:
        folder: With the four files of MNIST.
        threshold: Pixels above it become 1, others 0. The paper has binary input, and does not state how.

    Raises:
        ValueError: The files are incomplete or broken, or ``threshold`` leaves nothing to see.
    """
    if not 0 <= threshold < 255:
        raise ValueError(f"threshold={threshold} must lie in 0..254: pixels above it become 1")
    sets = open_image_sets(str(folder), validate_on_test=None)  # nothing is chosen by them

    def digits(data: Any) -> Digits:
        assert isinstance(data, ArrayDataset)
        images = torch.from_numpy(data.images > threshold).to(torch.uint8).flatten(1)
        return Digits(images, torch.from_numpy(data.labels.astype(np.int64)))

    return digits(sets.train), digits(sets.test)


def sigmoid_network(inputs: int, batch_norm: bool, weight_std: float, seed: int) -> nn.Sequential:
    """Three hidden layers of 100 sigmoid units, and a linear layer of 10 (section 4.1).

    Weights are N(0, weight_std^2), the same with and without BatchNorm; biases are 0. BatchNorm comes before the
    sigmoid, and the layer before it then has no bias (section 3.2).

    Args:
        inputs: Values of an image.
        batch_norm: Whether each hidden layer is normalised.
        weight_std: Of all initial weights.
        seed: Of the initial weights.

    Returns:
        A network from (N, inputs) to logits (N, 10).
    """
    widths = [inputs] + [HIDDEN_UNITS] * HIDDEN_LAYERS
    layers: list[nn.Module] = []
    for width, next_width in pairwise(widths):
        layers.append(nn.Linear(width, next_width, bias=not batch_norm))
        if batch_norm:
            layers.append(SyncBatchNorm(next_width))
        layers.append(nn.Sigmoid())
    layers.append(nn.Linear(HIDDEN_UNITS, CLASSES))
    generator = torch.Generator().manual_seed(seed)
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=weight_std, generator=generator)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def revision_of(checkpoint: Path) -> str:
    """The revision of this package that wrote the file of a run last."""
    return torch.load(checkpoint, weights_only=True).get("revision", UNKNOWN)


class Training:
    """One run, from its start or from its checkpoint, to its end.

    Args:
        run: What to train.
        train: Training images.
        test: Test images.
        checkpoint: File of the run: what it has reached, and in the end its result.
        rank: This process, in 0..run.ranks - 1.

    Raises:
        ValueError: The batch does not divide among the ranks.
    """

    def __init__(self, run: Run, train: Digits, test: Digits, checkpoint: Path, rank: int = 0) -> None:
        split_global_batch(run.batch_size, run.ranks)
        self.run, self.train, self.test, self.checkpoint, self.rank = run, train, test, checkpoint, rank
        self.dtype = getattr(torch, run.precision)
        self.network = sigmoid_network(train.images.shape[1], run.batch_norm, run.weight_std, run.seed).to(self.dtype)
        self.step = 0
        self.curves = Curves.empty()
        self._resume()
        self.steps_per_epoch = batches_per_epoch(len(train.labels), run.batch_size, drop_last=True)
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def complete(self, progress: Callable[[int], None]) -> Curves:
        """Train to the end.

        Args:
            progress: Called now and then with the number of steps taken so far.

        Returns:
            The curves, with NaN from where the loss is not finite any more.
        """
        options: dict[str, Any] = {BUFFER_OPTION: False}
        network = DistributedDataParallel(self.network, **options) if self.run.ranks > 1 else self.network
        optimizer = torch.optim.SGD(self.network.parameters(), lr=self.run.learning_rate)
        if self.step == 0:
            self._evaluate()
        while self.step < self.run.steps:
            images, labels = self._batch(self.step)
            optimizer.zero_grad()
            F.cross_entropy(network(images), labels).backward()
            optimizer.step()
            self.step += 1
            if self.step % self.run.evaluate_every == 0 or self.step == self.run.steps:
                self._evaluate()
                progress(self.step)
            if self.step % STEPS_BETWEEN_CHECKPOINTS == 0 or self.step == self.run.steps:
                self._save()
        return self.curves

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This rank's share of the mini-batch of a step: a function of the seed and the step."""
        epoch, number = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._epoch = epoch
            self._order = torch.from_numpy(epoch_order(len(self.train.labels), self.run.seed, epoch))
        size = self.run.batch_size
        start, stop = part_of_range(number * size, size, self.rank, self.run.ranks)
        samples = self._order[start:stop]
        images = self.train.images.index_select(0, samples)
        return images.to(self.dtype), self.train.labels[samples]

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Add a point to the curves; each rank takes a part of the test images."""
        images = len(self.test.labels)
        part = slice(*part_of_range(0, images, self.rank, self.run.ranks))
        labels = self.test.labels[part]
        last_sigmoid = self.network[-2]
        self.network.eval()
        with InputRecorder({"last": last_sigmoid}) as recorder:
            logits = self.network(self.test.images[part].to(self.dtype))
            [inputs] = recorder.inputs("last")
        self.network.train()
        hits = (logits.argmax(1) == labels).sum().double()
        losses = F.cross_entropy(logits, labels, reduction="sum").double()
        accuracy, loss = (sum_over_world(torch.stack([hits, losses])) / images).tolist()
        if math.isfinite(loss):
            self.curves.append(self.step, accuracy, loss, distribution(inputs).percentiles)
        else:
            self._give_up()

    def _give_up(self) -> None:
        """End the run, and its curves with NaN: a loss that is not finite stays so."""
        for step in range(self.step, self.run.steps + 1):
            if step % self.run.evaluate_every == 0 or step == self.run.steps:
                self.curves.append(step, math.nan, math.nan, torch.full((3, HIDDEN_UNITS), math.nan))
        self.step = self.run.steps

    def _resume(self) -> None:
        if not self.checkpoint.is_file():
            return
        state = torch.load(self.checkpoint, weights_only=True)
        self.step = state["step"]
        self.curves = Curves(**state["curves"])
        self.network.load_state_dict(state["network"])

    def _save(self) -> None:
        if self.rank != 0:
            return
        self.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        state = {
            "step": self.step,
            "curves": vars(self.curves),
            "network": self.network.state_dict(),
            "revision": source_revision(),
        }
        with atomic_file(self.checkpoint) as file:
            torch.save(state, file)
