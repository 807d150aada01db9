"""Internal covariate shift, watched: how the distributions of layers' inputs move while a network trains.

Source: section 1 of Ioffe & Szegedy 2015 for the term, Figure 1 (b, c) for the percentiles.
"""

import math
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from syncbn.collectives.world import gather_objects
from syncbn.models.observation import observe_inputs

PERCENTILES = (15, 50, 85)
"""Those of Figure 1."""


class Distribution(NamedTuple):
    """What is recorded of C quantities, over M values of each.

    Attributes:
        percentiles: Those of `PERCENTILES`, float64, shape (3, C).
        mean: float64, shape (C,).
        variance: Biased, float64, shape (C,).
    """

    percentiles: np.ndarray
    mean: np.ndarray
    variance: np.ndarray


def distribution(values: Tensor) -> Distribution:
    """The distribution over the values of all ranks together. A collective where there are several.

    Args:
        values: Of this rank, floating point, shape (M, C); M may differ between ranks, and be 0 on some.

    Returns:
        The same on all ranks.
    """
    double = values.detach().cpu().double().numpy()
    everywhere = np.concatenate(gather_objects(double))
    assert len(everywhere), "no rank has a value"
    percentiles = np.percentile(everywhere, PERCENTILES, axis=0)
    return Distribution(percentiles, everywhere.mean(axis=0), everywhere.var(axis=0))


class InputRecorder:
    """Keeps what modules are called with, while it is attached.

    Args:
        modules: By the name under which their inputs are kept.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self._inputs: dict[str, list[Tensor]] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> "InputRecorder":
        """Attach to the modules."""
        self._inputs = {name: [] for name in self.modules}
        for name, module in self.modules.items():
            self._handles += observe_inputs(module, self._inputs[name].append)
        return self

    def __exit__(self, *error: object) -> None:
        """Detach, and forget."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._inputs = [], {}

    def inputs(self, name: str) -> list[Tensor]:
        """The first argument of each call of a module since it was attached."""
        return self._inputs[name]


class CovariateShift(Callback):
    """Logs percentiles, mean and variance of the inputs of chosen layers, over the global batch of a step.

    They go to the trainer's loggers as ``input/<layer>/p15``, ``p50``, ``p85``, ``mean`` and ``variance``. Between
    the steps that are measured it costs nothing.

    Args:
        layers: Names of modules, as ``named_modules()`` of the LightningModule gives them, or patterns of such names
            in which ``*`` and ``?`` stand for a part between two dots: ``network.inception_*``, or
            ``network.inception_4a.branch_1x1.bn``. Within a module of `inception_bn` those are its ``conv`` and
            ``bn``.
        every_n_steps: Optimiser steps from one measurement to the next; the first is that of step 0.
        channel: The feature map or activation that is measured, "one typical" as in Figure 1. Null takes the values
            of all channels as one distribution.
        max_values: Of more values than that in a layer's input on a rank, about so many are measured, evenly spaced.

    Raises:
        ValueError: An argument is out of range.
    """

    def __init__(
        self, layers: Sequence[str], every_n_steps: int = 100, channel: int | None = 0, max_values: int = 100_000
    ) -> None:
        if not layers:
            raise ValueError("CovariateShift: layers is empty: name the modules whose inputs are to be recorded")
        for name, value in {"every_n_steps": every_n_steps, "max_values": max_values}.items():
            if value < 1:
                raise ValueError(f"CovariateShift: {name}={value} must be at least 1")
        if channel is not None and channel < 0:
            raise ValueError(f"CovariateShift: channel={channel} must not be negative")
        self.layers = tuple(layers)
        self.every_n_steps = every_n_steps
        self.channel = channel
        self.max_values = max_values
        self._recorder = InputRecorder({})
        self._measured_step: int | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the layers.

        Raises:
            ValueError: A name or pattern fits no module; the message lists those there are at its place.
        """
        self._recorder = InputRecorder(find_modules(pl_module, self.layers))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Attach before the first batch of a step that is measured."""
        if self._measured_step is None and trainer.global_step % self.every_n_steps == 0:
            self._measured_step = trainer.global_step
            self._recorder.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measure after the last batch of the step, and detach.

        Raises:
            ValueError: A layer was not run, or has no such channel.
        """
        if self._measured_step is None or trainer.global_step == self._measured_step:
            return  # not measured, or gradients are still accumulated
        metrics: dict[str, float] = {}
        for name in self._recorder.modules:
            found = distribution(self._values(name))
            quantities = [*found.percentiles[:, 0], found.mean[0], found.variance[0]]
            names = [*(f"p{percentile}" for percentile in PERCENTILES), "mean", "variance"]
            metrics |= {f"input/{name}/{n}": float(q) for n, q in zip(names, quantities, strict=True)}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=self._measured_step)
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave no hooks behind."""
        self._detach()

    def _detach(self) -> None:
        self._recorder.__exit__()
        self._measured_step = None

    def _remedy(self, name: str) -> str:
        """What to name instead of a module that only holds layers, which the network runs itself."""
        layers = [f"{name}.{n}" for n, m in self._recorder.modules[name].named_modules() if n and _is_leaf(m)]
        return f": name a layer in it: {', '.join(layers)}" if layers else ""

    def _values(self, name: str) -> Tensor:
        """The values of a layer's inputs that are measured on this rank, shape (M, 1)."""
        inputs = self._recorder.inputs(name)
        if not inputs:
            raise ValueError(f"CovariateShift: {name} was not run in step {self._measured_step}{self._remedy(name)}")
        if self.channel is not None:
            channels = inputs[0].shape[1]
            if self.channel >= channels:
                raise ValueError(
                    f"CovariateShift: channel={self.channel}, but the input of {name} has channels 0..{channels - 1}"
                )
            inputs = [x[:, self.channel] for x in inputs]
        values = [x.flatten() for x in inputs]
        total = sum(len(v) for v in values)
        stride = max(1, -(-total // self.max_values))
        # Else always the same columns of a feature map, or the same channels, would be looked at.
        sizes = math.prod(inputs[0].shape[1:])
        while stride > 1 and math.gcd(stride, sizes) > 1:
            stride += 1
        return torch.cat(values)[::stride, None]


def find_modules(root: nn.Module, patterns: Sequence[str]) -> dict[str, nn.Module]:
    """The modules that names or patterns fit, in the order of the network.

    Args:
        root: Where the names begin.
        patterns: As `CovariateShift` takes them.

    Raises:
        ValueError: One fits no module; the message lists those there are at its place.
    """
    modules = dict(root.named_modules())
    modules.pop("")
    fitting: set[str] = set()
    for pattern in patterns:
        found = {name for name in modules if _fits(name, pattern)}
        if not found:
            raise ValueError(f"there is no layer {pattern!r}; {_alternatives(root, pattern)}")
        fitting |= found
    return {name: module for name, module in modules.items() if name in fitting}


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def _fits(name: str, pattern: str) -> bool:
    parts, pattern_parts = name.split("."), pattern.split(".")
    return len(parts) == len(pattern_parts) and all(map(fnmatchcase, parts, pattern_parts))


def _alternatives(root: nn.Module, pattern: str) -> str:
    """The children of the module that the longest beginning of a name leads to."""
    module, path = root, ""
    for part in pattern.split("."):
        children = dict(module.named_children())
        if part not in children:
            break
        module, path = children[part], f"{path}{part}."
    names = [path + name for name, _ in module.named_children()]
    return f"there are: {', '.join(names)}" if names else f"{path.rstrip('.')} has no layers of its own"
