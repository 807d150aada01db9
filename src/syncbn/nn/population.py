"""Population statistics: what the network normalises with at inference, estimated anew after training (Algorithm 2)."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.collectives import world
from syncbn.functional.norm import Statistics
from syncbn.nn.checks import check_module
from syncbn.nn.convert import _become_local, _become_synchronised, _target_class
from syncbn.nn.sync_batch_norm import BatchNorm, SyncBatchNorm

_ESTIMATORS = ("paper", "pooled")


@torch.no_grad()
def estimate_population_statistics(
    model: nn.Module, batches: Iterable[Any], num_batches: int, estimator: str = "paper"
) -> nn.Module:
    """Replace the running statistics by population statistics over `num_batches` mini-batches.

    A mini-batch is what the layers normalise together: one batch of every rank of their process group. The weights
    do not change; dropout and the like are off. Estimators:

    - "paper", Algorithm 2: E[x] = E_B[mu_B], Var[x] = M/(M-1) * E_B[var_B], means over mini-batches of equal weight.
      The spread of the mu_B between mini-batches does not enter.
    - "pooled": exact mean and unbiased variance of all values in all mini-batches, spread included.

    Every layer normalises by its mini-batch while the statistics of the next are gathered, as in training.

    Args:
        model: with `SyncBatchNorm` or `nn.BatchNorm*d` layers; those in eval mode (frozen) are left alone only if
            the whole model was in training mode. Its training flags come back as they were.
        batches: this rank's share of each mini-batch: a tensor, or a tuple, list or dict whose first entry is one;
            moved to the model's device.
        num_batches: how many mini-batches to use, 1 or more.
        estimator: "paper" or "pooled".

    Returns:
        `model`, its running_mean and running_var set, the same on all ranks.

    Raises:
        ValueError: an argument out of range, no layers, or fewer batches, or one without a tensor, on some rank (raised
            on all of them).
    """
    check_module(model, "estimate_population_statistics")
    if estimator not in _ESTIMATORS:
        raise ValueError(f"estimator must be one of {_ESTIMATORS}, got {estimator!r}")
    if not isinstance(num_batches, Integral) or num_batches < 1:
        raise ValueError(f"num_batches must be an integer, 1 or more, got {num_batches!r}")
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise ValueError(f"batches must be an iterable of batches, got {type(batches).__name__}: put it into a list")
    with _only_batch_norm_trains(model) as layers:
        if not layers:
            raise ValueError("the model has no BatchNorm layer that tracks running statistics")
        sums = {layer: _Sums(layer, estimator) for layer in layers}
        device = layers[0].running_mean.device
        stream = iter(batches)
        for step in range(num_batches):
            input, problem = _next_input(stream)
            if not world.all_ranks(input is not None, device):
                raise ValueError(
                    f"num_batches={num_batches}, but after {step} {problem or 'another rank has none that can be used'}"
                )
            assert input is not None
            model(input.to(device))
        found = [sums[layer].statistics() for layer in layers]
        for layer, (mean, var) in zip(layers, found, strict=True):
            assert layer.running_mean is not None and layer.running_var is not None
            layer.running_mean.copy_(mean.to(layer.running_mean.dtype))
            layer.running_var.copy_(var.to(layer.running_var.dtype))
    return model


class _Sums:
    """Of one layer: float64 sums over mini-batches, [mean, variance, weight]."""

    def __init__(self, layer: BatchNorm, estimator: str) -> None:
        self.layer, self.pooled = layer, estimator == "pooled"
        group = layer._group()
        self.ranks = 1 if group is None else group.size()
        self.total: Tensor | None = None
        layer.observer = self.add

    def add(self, statistics: Statistics) -> None:
        mean, var, M = statistics
        if self.pooled:
            rows = torch.stack([mean, var + mean.square(), torch.ones_like(mean)]) * M
        else:
            rows = torch.stack([mean, statistics.unbiased_var, torch.ones_like(mean)]) * (M > 0)
        rows = rows / self.ranks  # each of which adds the same
        self.total = rows if self.total is None else self.total + rows

    def statistics(self) -> tuple[Tensor, Tensor]:
        name = f"{type(self.layer).__name__}({self.layer.num_features})"
        if self.total is None:
            raise ValueError(f"the forward never came through {name}")
        first, second, weight = world.sum_over_world(self.total)
        if not weight.any():
            raise ValueError(f"all batches of {name} were empty on all ranks")
        mean, var = first / weight, second / weight
        if self.pooled:
            var = (var - mean.square()).clamp(min=0) * (weight / (weight - 1).clamp(min=1))
        return mean, var


@contextlib.contextmanager
def _only_batch_norm_trains(model: nn.Module) -> Iterator[list[BatchNorm]]:
    """BatchNorm layers in training mode but not updating, all else in eval mode; plain layers synchronised for now."""
    modes = {module: module.training for module in model.modules()}
    frozen = {m for m in modes if isinstance(m, _BatchNorm) and not m.training} if model.training else set()
    plain = [m for m in modes if isinstance(m, _BatchNorm) and not isinstance(m, BatchNorm)]
    targets = [_target_class(type(layer).__name__, layer) for layer in plain]
    try:
        for layer, target in zip(plain, targets, strict=True):
            _become_synchronised(layer, target, None)
        model.eval()
        layers = [m for m in modes if isinstance(m, BatchNorm) and m.running_mean is not None and m not in frozen]
        for layer in layers:
            layer.training = True
        yield layers
    finally:
        for module, training in modes.items():
            module.training = training
            if isinstance(module, BatchNorm):
                module.observer = None
        for layer in plain:
            if isinstance(layer, SyncBatchNorm):
                _become_local(layer)


def _next_input(stream: Iterator[Any]) -> tuple[Tensor | None, str | None]:
    """The input in the next batch; or None, and what is wrong with this rank's."""
    try:
        batch = next(stream)
    except StopIteration:
        return None, "this rank has no further batch"
    while isinstance(batch, Mapping | list | tuple) and len(batch) > 0:
        batch = next(iter(batch.values())) if isinstance(batch, Mapping) else batch[0]
    if isinstance(batch, Tensor):
        return batch, None
    return None, (
        f"this rank's batch begins with {type(batch).__name__}: give a tensor, or a tuple, list or dict whose first "
        "entry is one"
    )
