"""Makes any network's BatchNorm layers synchronised, and undoes it, in place and without a copy.

A layer keeps its identity: only its class changes, so parameters, buffers, hooks, flags, sharing and names are what
they were. This is also why only classes whose behaviour is known are converted.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from syncbn.collectives import groups
from syncbn.nn.checks import check_module
from syncbn.nn.sync_batch_norm import BatchNorm, SyncBatchNorm, call_in_graph

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class SyncBatchNormAct(SyncBatchNorm):
    """A converted timm `BatchNormAct2d`: its drop and activation modules follow the normalisation."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalise, then apply the layer's own `drop` and `act`."""
        if torch.jit.is_scripting():
            return self.act(self.drop(self._scripted(input, residual)))  # type: ignore[operator]
        else:
            if isinstance(input, fx.Proxy):
                return call_in_graph(self, input, residual)
            drop: Any = self.drop
            act: Any = self.act
            return act(drop(super().forward(input, residual)))


def convert_sync_batchnorm(module: nn.Module, process_group: dist.ProcessGroup | None = None) -> nn.Module:
    """Turn every `nn.BatchNorm1d/2d/3d`, `nn.SyncBatchNorm` and reverted layer of `module` into a `SyncBatchNorm`.

    In place: the layers stay the objects that they are.

    Args:
        module: a network, or one layer. timm's `BatchNormAct2d` is converted too, with its activation.
        process_group: the ranks that normalise together; None for all, or for the group that an `nn.SyncBatchNorm`
            has. Layers that are `syncbn.SyncBatchNorm` already keep theirs.

    Returns:
        `module`. Undo with `revert_sync_batchnorm`.

    Raises:
        ValueError: a layer whose class has behaviour of its own, so that converting it would change what it does;
            nothing is converted then.
    """
    check_module(module, "convert_sync_batchnorm")
    groups.check_member(process_group)
    found = [(name, layer, _target_class(name or "module", layer)) for name, layer in unsynchronised_layers(module)]
    for _, layer, target in found:
        _become_synchronised(layer, target, process_group)
    return module


def unsynchronised_layers(module: nn.Module) -> list[tuple[str, _BatchNorm]]:
    """The BatchNorm layers of `module` that this package does not synchronise, by name."""
    return [
        (name, layer)
        for name, layer in module.named_modules()
        if isinstance(layer, _BatchNorm) and not isinstance(layer, SyncBatchNorm)
    ]


def revert_sync_batchnorm(module: nn.Module) -> nn.Module:
    """Make every `SyncBatchNorm` in `module` normalise this rank's batch only, in place.

    Converted layers get their class back. Layers that were built synchronised become `syncbn.nn.BatchNorm`, which
    keeps a fused activation and takes inputs of any dimension.

    Returns:
        `module`.
    """
    check_module(module, "revert_sync_batchnorm")
    for layer in list(module.modules()):
        if isinstance(layer, SyncBatchNorm):
            _become_local(layer)
        if hasattr(type(layer), "ungroup"):  # what `group_messages` made of it, without messages to group any more
            layer.ungroup()  # type: ignore[operator]
    return module


def _become_synchronised(layer: Any, target: type[SyncBatchNorm], group: dist.ProcessGroup | None) -> None:
    own_group = layer.__dict__.pop("process_group", None)  # of an nn.SyncBatchNorm
    layer._original = (type(layer), own_group)
    layer.__class__ = target
    layer.process_group = own_group if group is None else group
    if "activation" not in layer.__dict__:
        layer.activation = None
        layer._adopt()
        layer._keep_statistics_wide(dict(layer._buffers))


def _become_local(layer: Any) -> None:
    if "_original" not in layer.__dict__ and type(layer) is not SyncBatchNorm:
        raise ValueError(f"revert_sync_batchnorm: no plain counterpart is known of {_class_name(layer)}")
    kind, group = layer.__dict__.pop("_original", (BatchNorm, None))
    del layer.__dict__["_group_reference"]
    if kind is not BatchNorm:
        for attribute in ("activation", "_serial", "_memory", "_layer_name", "observer"):
            layer.__dict__.pop(attribute, None)
    layer.__class__ = kind
    if kind is nn.SyncBatchNorm:
        layer.process_group = group


def _target_class(name: str, layer: _BatchNorm) -> type[SyncBatchNorm]:
    kind = type(layer)
    if kind is BatchNorm:
        return SyncBatchNorm
    if isinstance(layer, LazyModuleMixin):
        raise _refusal(name, layer, "its number of channels is not known yet; run one forward first")
    if parametrize.is_parametrized(layer):
        raise _refusal(name, layer, "it is parametrized; remove the parametrizations first")
    if hasattr(layer, "activation"):
        raise _refusal(name, layer, "it has an attribute `activation` of its own")
    if "forward" in layer.__dict__:
        raise _refusal(name, layer, "its forward was replaced on the instance")
    if kind.__name__ == "BatchNormAct2d" and kind.__module__.startswith("timm."):
        return SyncBatchNormAct
    own = [n for c in kind.__mro__ if c not in _base(kind).__mro__ for n in vars(c) if _matters(n)]
    if own:
        raise _refusal(name, layer, f"it defines {', '.join(sorted(set(own)))} itself")
    return SyncBatchNorm


def _base(kind: type) -> type:
    return next((c for c in kind.__mro__ if c in _PLAIN), _BatchNorm)


def _matters(attribute: str) -> bool:
    """Whether a class attribute is behaviour: any name, and the special methods that modules are run by.

    Not what an input's dimensions may be: a converted layer takes those of every class.
    """
    if attribute == "_check_input_dim":
        return False
    special = attribute.startswith("__") and attribute.endswith("__")
    return not special or attribute in ("__call__", "__getattr__", "__setattr__", "__getstate__", "__setstate__")


def _refusal(name: str, layer: nn.Module, reason: str) -> ValueError:
    return ValueError(
        f"convert_sync_batchnorm: '{name}' is a {_class_name(layer)}, which cannot be converted: {reason}. Replace it "
        "by a syncbn.SyncBatchNorm, or convert the parts of the network without it"
    )


def _class_name(layer: nn.Module) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"
