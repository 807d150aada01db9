"""SyncBatchNorm, and the form in which several layers share one message."""

import threading
from collections.abc import Callable, Sequence
from copy import copy
from itertools import count
from numbers import Integral, Real
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, fx
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn import ops
from syncbn.collectives.agreement import LayerName
from syncbn.collectives.groups import active_group, group_ranks
from syncbn.functional.dispatch import Normalization
from syncbn.functional.memory import Memory
from syncbn.functional.norm import Norm, Route, Settings, Statistics, Tensors, only_operators
from syncbn.nn.checks import as_dense, check_dense, check_list, check_residual, checked_parameters
from syncbn.nn.group_reference import GroupReference
from syncbn.nn.naming import layer_names
from syncbn.nn.scripting import scripted_batch_norm
from syncbn.recomputing import unseen_by_selective_checkpoints

_thread = threading.local()  # its number; ranks may start their threads in another order
_threads = count()
_built: dict[int, int] = {}  # layers, by the number of the thread
_BUFFERS = ("running_mean", "running_var")


class BatchNorm(_BatchNorm):
    """Batch normalisation of this rank's batch, for inputs of any dimension: `SyncBatchNorm` without the others.

    Arguments, parameters, buffers and shapes are those of `SyncBatchNorm`. `revert_sync_batchnorm` leaves it in the
    place of a layer that was built synchronised.
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        _check_arguments(num_features, eps, momentum, activation)
        super().__init__(num_features, eps, momentum, affine, track_running_stats, device, dtype)
        if not bias:  # not handed on: older versions of torch do not take it
            self.register_parameter("bias", None)
        self.activation = activation
        self._adopt()
        self._keep_statistics_wide(self._buffers)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalise.

        Args:
            input: (N, C, ...), floating point, any strides; N may be 0.
            residual: like input; added after the normalisation, before the activation.

        Returns:
            Like input, in its dtype and memory format.
        """
        if torch.jit.is_scripting():
            return self._scripted(input, residual)
        else:  # which TorchScript does not read
            if isinstance(input, fx.Proxy):
                return call_in_graph(self, input, residual)
            return start_sync_batch_norm([self], [input]).finish([residual])[0]

    def _scripted(self, input: Tensor, residual: Tensor | None) -> Tensor:
        return self._scripted_alone(input, residual)

    def _scripted_alone(self, input: Tensor, residual: Tensor | None) -> Tensor:
        """What torch.jit.script compiles: that of nn.BatchNorm*d, with residual and activation."""
        mean, var, momentum = self.running_mean, self.running_var, 0.0
        if self.training:
            if not self.track_running_stats:
                mean, var = None, None
            elif self.num_batches_tracked is not None:
                self.num_batches_tracked.add_(1)
                momentum = 1.0 / float(self.num_batches_tracked)
            if self.momentum is not None:
                momentum = float(self.momentum)
        uses_batch = self.training or mean is None
        y = scripted_batch_norm(
            input, residual, mean, var, self.weight, self.bias, uses_batch, momentum, float(self.eps)
        )
        return y if self.activation is None else F.relu(y)

    def extra_repr(self) -> str:
        """The arguments, as `nn.BatchNorm2d` shows them, and the activation where there is one."""
        return super().extra_repr() + (f", activation={self.activation}" if self.activation else "")

    def _adopt(self) -> None:
        """State beside parameters and buffers; also given to a converted layer."""
        if not hasattr(_thread, "number"):
            _thread.number = next(_threads)
        self._serial = (_built.get(_thread.number, 0), _thread.number)
        _built[_thread.number] = self._serial[0] + 1
        self._memory = Memory()
        self.observer: Callable[[Statistics], None] | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.pop("_layer_name", None)
        self._adopt()  # a copy is another layer

    def _group(self) -> dist.ProcessGroup | None:
        return None

    def _check_input_dim(self, input: Tensor) -> None:
        check_dense(input, "input")
        _check_size(input, self.num_features)

    def _apply(self, fn: Any, recurse: bool = True) -> "BatchNorm":
        """Move or convert, but keep the running statistics in float32 or wider: averages need the digits."""
        before = {name: self._buffers.get(name) for name in _BUFFERS}
        super()._apply(fn, recurse)
        self._keep_statistics_wide(before)
        return self

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        self._keep_statistics_wide(self._buffers)  # load_state_dict(assign=True) takes any dtype

    def _keep_statistics_wide(self, wide: Any) -> None:
        for name in _BUFFERS:
            buffer = self._buffers.get(name)
            if buffer is not None and buffer.dtype in (torch.float16, torch.bfloat16):
                self._buffers[name] = wide[name].to(buffer.device, torch.float32)

    def _update_running_statistics(self, statistics: Statistics) -> None:
        """One step of the moving averages; nothing changes where the batch was empty on all ranks."""
        if self.observer is not None:
            self.observer(statistics)
            return
        running = self._running()
        if running is not None:
            ops.update_running(running, *statistics)

    def _running(self) -> ops.Running | None:
        if self.running_mean is None or self.running_var is None or not self.track_running_stats:
            return None
        if self.momentum is None and self.num_batches_tracked is None:  # no count to average over
            return None
        return ops.Running(self.running_mean, self.running_var, self.num_batches_tracked, self.momentum)


def call_in_graph(layer: BatchNorm, *inputs: Any) -> Any:
    """The layer as one node of the graph that torch.fx traces, as it takes torch's own layers."""
    tracer = inputs[0].tracer
    return tracer.create_proxy("call_module", tracer.path_of_module(layer), inputs, {})


def layers_built(layers: Sequence[BatchNorm]) -> int:
    """How many layers the threads that built these ones have built so far."""
    return sum(_built[layer._serial[1]] for layer in layers)


class SyncBatchNorm(BatchNorm):
    """Batch normalisation over the batches of all ranks, as one batch (Algorithm 1 of Ioffe & Szegedy 2015).

    Each rank sums its mini-batch; one all-reduce of 2C+3 float64 adds the sums up; so the result is that of one
    process with the whole batch, also for ranks whose batches differ in size or are empty. Works on any device and
    backend, inside DistributedDataParallel and without; in one process it is `nn.BatchNorm1d/2d/3d`, whose
    state_dict it shares.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: of the running statistics, in [0, 1]; None for a cumulative average.
        affine: learn weight (gamma) and bias (beta), both (C).
        track_running_stats: keep running_mean and running_var (C), float32 or wider, the latter unbiased over the
            global batch; bitwise the same on all ranks.
        process_group: the ranks that normalise together; None for all.
        device: of parameters and buffers.
        dtype: of the parameters.
        bias: without it, an affine layer learns weight alone.
        activation: None, or "relu" to apply it in the same pass.

    Raises:
        ValueError: an argument out of range; a process group that this rank is not in.
        LayerMismatch: in forward or backward, if ranks run different layers.
    """

    __jit_unused_properties__ = ("process_group",)
    __jit_ignored_attributes__ = ("process_group",)

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        bias: bool = True,
        activation: str | None = None,
    ) -> None:
        super().__init__(
            num_features,
            eps,
            momentum,
            affine,
            track_running_stats,
            device,
            dtype,
            bias=bias,
            activation=activation,
        )
        self.process_group = process_group

    def _scripted(self, input: Tensor, residual: Tensor | None) -> Tensor:
        if self.training:
            raise RuntimeError(
                "a scripted SyncBatchNorm does not synchronise: call .eval() before the forward, or script "
                "revert_sync_batchnorm(model), in which each rank normalises its own batch"
            )
        return self._scripted_alone(input, residual)

    def __prepare_scriptable__(self) -> "SyncBatchNorm":
        """What torch.jit.script asks each module for first."""
        if self.training:
            (name,) = layer_names([self])
            raise ValueError(
                f"torch.jit.script: {name} is in training mode, in which it synchronises, and TorchScript knows no "
                "all-reduce: call .eval() on the model first, or script revert_sync_batchnorm(model)"
            )
        return self

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks that normalise together; None for all."""
        return self._group_reference.group

    @process_group.setter
    def process_group(self, group: dist.ProcessGroup | None) -> None:
        self._group_reference = GroupReference(group)

    def extra_repr(self) -> str:
        """The arguments, and the group: "world", or the list of its ranks."""
        return f"{super().extra_repr()}, process_group={self._group_reference}"

    def _group(self) -> dist.ProcessGroup | None:
        return active_group(self._group_reference.group)


Layers: TypeAlias = BatchNorm | Sequence[BatchNorm]


class PendingBatchNorm:
    """A synchronisation of several layers under way; made by `start_sync_batch_norm`."""

    def __init__(self, entries: "Sequence[_Entry]", split: bool) -> None:
        self.split = split
        self.entries = [part for e in entries for part in e.parts()] if split else entries
        self.live = [e for e in self.entries if e.uses_batch]
        self.normalization = Normalization(
            [e.input for e in self.live],
            [e.span for e in self.live],
            [t for e in self.live for t in e.tensors],
            _route([layer for e in self.live for layer in e.layers]),
            self.live[0].layers[0]._memory if self.live else Memory(),
        )

    def finish(self, residuals: Sequence[Tensor | None] | None = None) -> list[Tensor]:
        """Wait for the message and normalise.

        Args:
            residuals: for each input, a tensor like it to add before the activation, or None. Not with ``split``.

        Returns:
            The outputs, like the inputs, or with ``split`` like each layer's part of them.
        """
        if self.split and residuals is not None and any(r is not None for r in residuals):
            raise ValueError("residuals cannot be added with split=True: leave split out, or add them to the outputs")
        if residuals is None or self.split:
            residuals = [None] * len(self.entries)
        check_list(residuals, "residuals")
        if len(residuals) != len(self.entries):
            raise ValueError(f"expected {len(self.entries)} residuals, one or None an input, got {len(residuals)}")
        for entry, residual in zip(self.entries, residuals, strict=True):
            entry.take(residual)
        with unseen_by_selective_checkpoints():  # the updates of moving averages, too
            normalised = iter(self._normalize())
        outputs = [next(normalised) if e.uses_batch else e.from_running_statistics() for e in self.entries]
        if not self.split:
            return [e.laid_out(y) for e, y in zip(self.entries, outputs, strict=True)]
        return [e.laid_out(part) for e, y in zip(self.entries, outputs, strict=True) for part in e.split(y)]

    def _normalize(self) -> list[Tensor]:
        if not self.live:
            return []
        norms, running = [e.norm() for e in self.live], [e.running() for e in self.live]
        outputs, statistics, repeated, updated = self.normalization.finish(norms, running)
        if not repeated:
            for entry, done, found in zip(self.live, updated, statistics, strict=True):
                if not done:
                    entry.update(found)
        return outputs


def start_sync_batch_norm(layers: Sequence[Layers], inputs: Sequence[Tensor], split: bool = False) -> PendingBatchNorm:
    """Launch the one message that the layers share; `finish()` of the result waits for it and normalises.

    What runs between the two runs while the message travels, and likewise going backward.

    Args:
        layers: one entry an input: a layer, or several whose channels lie side by side in the input. Layers must not
            depend on each other's outputs, and must share a process group.
        inputs: (N, C, ...) each; sizes may differ.
        split: return an output for each layer, also of those side by side in one input. Where these go different ways,
            that spares a GPU copies. Such outputs may be views, not to be changed in place.

    Raises:
        ValueError: entries and inputs do not match, or the process groups differ.
    """
    check_list(layers, "layers")
    check_list(inputs, "inputs")
    if len(layers) != len(inputs):
        raise ValueError(
            f"expected one input for each entry of layers, got {len(layers)} layers and {len(inputs)} inputs"
        )
    return PendingBatchNorm([_Entry(layer, x) for layer, x in zip(layers, inputs, strict=True)], split)


def sync_batch_norm_group(layers: Sequence[Layers], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Normalise several independent activations with one all-reduce in each direction.

    The outputs are those of `[layer(x) for layer, x in zip(layers, inputs)]`; arguments and errors as in
    `start_sync_batch_norm`.
    """
    return start_sync_batch_norm(layers, inputs).finish()


class _Entry:
    """One input and the layers side by side in it."""

    def __init__(self, layers: Layers, input: Tensor) -> None:
        self.layers = (layers,) if isinstance(layers, BatchNorm) else _side_by_side(layers)
        self.input = as_dense(input, "input")
        self.is_mkldnn = self.input is not input
        self.span: ops.Span | None = None
        self.residual: Tensor | None = None
        self.tensors: list[Tensor | None] = [self.input]
        if not torch.jit.is_tracing():  # which warns of every comparison of a size
            _check_size(self.input, sum(layer.num_features for layer in self.layers))
            for layer in self.layers:
                self.tensors += checked_parameters(layer, self.input)
        first = self.layers[0]
        if len(self.layers) > 1:
            _check_siblings(self.layers)
        self.uses_batch = first.training or (first.running_mean is None and first.running_var is None)

    def parts(self) -> "list[_Entry]":
        """An entry for each layer, where it normalises by its batch and the passes can take its channels alone."""
        if len(self.layers) == 1 or not self.uses_batch or not ops.reads_spans(self.input):
            return [self]
        if only_operators(self.tensors):
            return [self]
        parts, first, input = [], 0, ops.dense(self.input)
        for layer in self.layers:
            part = copy(self)
            part.layers, part.input = (layer,), input
            part.span = ops.Span(first, layer.num_features, input.shape[1])
            parts.append(part)
            first += layer.num_features
        return parts

    def split(self, y: Tensor) -> Sequence[Tensor]:
        """What of the output is each layer's."""
        return (y,) if len(self.layers) == 1 else y.split([layer.num_features for layer in self.layers], dim=1)

    def laid_out(self, y: Tensor) -> Tensor:
        """An output in the layout of the input."""
        return y.to_mkldnn() if self.is_mkldnn else y

    def take(self, residual: Tensor | None) -> None:
        if residual is not None:
            residual = as_dense(residual, "residual")
            check_residual(residual, self.input)
        self.residual = residual

    def norm(self) -> Norm:
        first = self.layers[0]
        tensors = Tensors(self.input, self._joined("weight"), self._joined("bias"), self.residual)
        return Norm(tensors, Settings(first.eps, first.activation, span=self.span))

    def running(self) -> ops.Running | None:
        """The moving averages, where they are those of one layer in training that nobody observes."""
        first = self.layers[0]
        return first._running() if len(self.layers) == 1 and first.training and first.observer is None else None

    def update(self, statistics: Statistics) -> None:
        if not self.layers[0].training:
            return
        if len(self.layers) == 1:
            self.layers[0]._update_running_statistics(statistics)
            return
        widths = [layer.num_features for layer in self.layers]
        parts = zip(statistics.mean.split(widths), statistics.var.split(widths), strict=True)
        for layer, (mean, var) in zip(self.layers, parts, strict=True):
            layer._update_running_statistics(Statistics(mean, var, statistics.M))

    def from_running_statistics(self) -> Tensor:
        names = ("running_mean", "running_var", "weight", "bias")
        x, dtype = self.input, ops.compute_dtype(self.input.dtype)
        mean, var, weight, bias = (None if (v := self._joined(n)) is None else v.to(dtype) for n in names)
        x = x if x.device.type == "cuda" else x.to(dtype)  # elsewhere ATen may know no mixture of dtypes
        y = F.batch_norm(x, mean, var, weight, bias, False, 0.0, self.layers[0].eps)
        if self.residual is not None:
            y = y + self.residual
        if self.layers[0].activation == "relu":
            y = F.relu(y)
        return y.to(self.input.dtype)

    def _joined(self, name: str) -> Tensor | None:
        tensors = [getattr(layer, name) for layer in self.layers]
        return tensors[0] if len(tensors) == 1 or tensors[0] is None else torch.cat(tensors)


def _side_by_side(layers: Any) -> tuple[BatchNorm, ...]:
    is_sequence = isinstance(layers, Sequence | torch.nn.ModuleList) and not isinstance(layers, str)
    found = tuple(layers) if is_sequence else (layers,)
    for layer in found:
        if not isinstance(layer, BatchNorm):
            raise ValueError(
                f"expected SyncBatchNorm layers, got {type(layer).__name__}: convert it with convert_sync_batchnorm"
            )
    if not found:
        raise ValueError("expected a layer, or several whose channels lie side by side, got an empty list")
    return found


def _check_size(input: Tensor, channels: int) -> None:
    if input.dim() < 2:
        raise ValueError(f"expected an input of 2 or more dimensions (N, C, ...), got size {list(input.shape)}")
    if input.shape[1] != channels:
        raise ValueError(f"expected {channels} channels in dimension 1, got {input.shape[1]}: size {list(input.shape)}")


def _check_siblings(layers: Sequence[BatchNorm]) -> None:
    settings = {
        what: {getattr(layer, what) for layer in layers}
        for what in ("eps", "activation", "training", "affine", "track_running_stats")
    }
    settings["bias"] = {layer.bias is not None for layer in layers}
    for what, values in settings.items():
        if len(values) > 1:
            raise ValueError(f"layers side by side in one input must have the same {what}, got {values}")


def _route(layers: Sequence[BatchNorm]) -> Route | None:
    groups = [layer._group() if layer.training else None for layer in layers]
    group = groups[0] if groups else None
    if any(g is not group for g in groups):
        raise ValueError(
            f"layers that share a message must share a process group; got ranks {[group_ranks(g) for g in groups]}"
        )
    if group is None:
        return None
    if torch.jit.is_tracing():
        raise ValueError(
            f"torch.jit.trace: {layer_names(layers)[0]} is in training mode, in which it synchronises {group.size()} "
            "ranks, and a trace holds no all-reduce: call .eval() on the model first, or trace "
            "revert_sync_batchnorm(model)"
        )
    if torch.compiler.is_compiling():  # names are out of a tracer's reach
        return Route(group, tuple(LayerName("", f"BatchNorm({layer.num_features})", 0) for layer in layers), 0)
    return Route(group, layer_names(layers), layers_built(layers))


def _check_arguments(num_features: int, eps: float, momentum: float | None, activation: str | None) -> None:
    if not isinstance(num_features, Integral) or num_features < 1:
        raise ValueError(f"num_features must be an integer, 1 or more, got {num_features!r}")
    if not isinstance(eps, Real) or eps < 0:
        raise ValueError(f"eps must be a number, not negative, got {eps!r}")
    if momentum is not None and not (isinstance(momentum, Real) and 0 <= momentum <= 1):
        raise ValueError(f"momentum must be in [0, 1], or None for a cumulative average, got {momentum!r}")
    if activation not in (None, "relu"):
        raise ValueError(f'activation must be None or "relu", got {activation!r}')
