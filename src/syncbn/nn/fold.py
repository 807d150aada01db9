"""Algorithm 2's inference network: every BatchNorm folded into the convolution or linear layer before it."""

import copy
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.nn.checks import check_module
from syncbn.nn.sync_batch_norm import BatchNorm
from syncbn.ops import as_statistic, per_channel

_FOLDABLE = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


class _Activation(nn.Module):
    """What is left of a folded layer that fused a ReLU, or that adds a residual."""

    def __init__(self, activation: str | None) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._activated(input, residual)

    def _activated(self, input: Tensor, residual: Tensor | None) -> Tensor:
        if residual is not None:
            input = input + residual
        return input if self.activation is None else input.relu()


class _AfterLinear(_Activation):
    """Follows an nn.Linear: undoes the folding of an output longer than (N, C), whose channels are not last."""

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__(getattr(norm, "activation", None))
        assert norm.running_mean is not None
        mean = norm.running_mean
        scale, shift = (v.to(mean.dtype).to(mean.device) for v in affine_map(norm))
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        if input.dim() > 2:
            input = (input - self.shift) / self.scale
            input = input * per_channel(self.scale, input) + per_channel(self.shift, input)
        return self._activated(input, residual)


def affine_map(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """The layer at inference as scale and shift (C), float64: gamma/sqrt(Var+eps), beta - gamma*E[x]/sqrt(Var+eps).

    Where the layer is or, where that is a device without float64, on the host.

    Source: Algorithm 2, line 11.

    Raises:
        ValueError: the layer has no running statistics.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError(f"{type(norm).__name__}({norm.num_features}) cannot be folded: it keeps no running statistics")
    scale = (as_statistic(norm.running_var.detach()) + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * as_statistic(norm.weight.detach())
    shift = -as_statistic(norm.running_mean.detach()) * scale
    return scale, shift if norm.bias is None else shift + as_statistic(norm.bias.detach())


@torch.no_grad()
def fold_into(linear: nn.Module, norm: _BatchNorm) -> nn.Module:
    """A copy of `linear` (a convolution or nn.Linear) that computes norm(linear(x)) at inference."""
    scale, shift = affine_map(norm)
    folded: Any = copy.deepcopy(linear).eval()
    weight, old_bias = folded.weight, folded.bias
    factor = scale.view(-1, *[1] * (weight.dim() - 1))
    bias = shift if old_bias is None else shift + as_statistic(old_bias) * scale
    for name, value in (("weight", as_statistic(weight) * factor), ("bias", bias)):
        value = value.to(weight.dtype).to(weight.device)
        setattr(folded, name, nn.Parameter(value, weight.requires_grad))
    return folded


def fold_batch_norm(model: nn.Module) -> nn.Module:
    """A copy of `model` for inference in which each BatchNorm is folded into the layer before it.

    A network that knows its own pairs (`inception_bn`) folds itself; others are traced with torch.fx, whole or, where
    that fails, child by child. A BatchNorm that no convolution or linear layer feeds alone stays as it is.

    Args:
        model: any network; its running statistics are used, best those of `estimate_population_statistics`.

    Returns:
        A new network in eval mode whose outputs are the model's in eval mode, to rounding.

    Raises:
        ValueError: a BatchNorm to be folded keeps no running statistics.
    """
    check_module(model, "fold_batch_norm")
    fold_itself = getattr(model, "fold_batch_norm", None)
    if callable(fold_itself):
        return cast(nn.Module, fold_itself())
    model = copy.deepcopy(model).eval()
    _fold_children(model)
    return model


def _fold_children(module: nn.Module) -> None:
    for name, child in module.named_children():
        fold_itself = getattr(child, "fold_batch_norm", None)
        if callable(fold_itself):
            setattr(module, name, fold_itself())
    pairs = _traced_pairs(module)
    if pairs is None:
        for child in module.children():
            _fold_children(child)
        return
    for linear_name, norm_name in pairs:
        linear, norm = module.get_submodule(linear_name), module.get_submodule(norm_name)
        assert isinstance(norm, _BatchNorm)
        module.set_submodule(linear_name, fold_into(linear, norm))
        left = _AfterLinear(norm) if isinstance(linear, nn.Linear) else _Activation(getattr(norm, "activation", None))
        module.set_submodule(norm_name, left.eval())


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _BatchNorm) or super().is_leaf_module(m, module_qualified_name)


def _traced_pairs(module: nn.Module) -> list[tuple[str, str]] | None:
    """(linear, norm) names where the norm is the linear's only reader and both are called once; None if untraceable."""
    try:
        graph = _Tracer().trace(module)
    except Exception:  # tracing runs the user's forward on proxies: anything may be raised
        return None
    modules: dict[str, Any] = dict(module.named_modules(remove_duplicate=False))
    read_directly = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    calls = [node for node in graph.nodes if node.op == "call_module"]
    uses: dict[int, int] = {}
    for node in calls:
        key = id(modules[str(node.target)])
        uses[key] = uses.get(key, 0) + 1
    pairs = []
    for node in calls:
        norm, source = modules[str(node.target)], node.args[0] if node.args else None
        if type(norm).forward not in _PLAIN_FORWARDS or not isinstance(source, fx.Node) or source.op != "call_module":
            continue
        linear = modules[str(source.target)]
        alone = len(source.users) == 1 and uses[id(norm)] == 1 and uses[id(linear)] == 1
        alone = alone and not any(name.startswith(f"{source.target}.") for name in read_directly)
        if isinstance(linear, nn.Linear) and norm.weight is not None and not norm.weight.all():
            continue  # a scale of 0 could not be undone
        if type(linear) in _FOLDABLE and alone and linear.weight.shape[0] == norm.num_features:
            pairs.append((str(source.target), str(node.target)))
    return pairs


_PLAIN_FORWARDS = (BatchNorm.forward, _BatchNorm.forward, nn.SyncBatchNorm.forward)
