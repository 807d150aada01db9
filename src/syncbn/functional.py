"""Synchronised batch normalisation as a differentiable function, of one activation or of several in one message.

It comes in two halves, so that other work can run while a message travels: `start` sums locally and launches the
all-reduce, `Started.finish` waits for it and normalises. Going backward, finish's node launches the reduction of the
gradient sums and start's node waits for it; autograd runs whatever lies between the two in the meantime.

Two implementations of the same numbers:
- fused: the passes of `syncbn.ops` inside two autograd nodes. The default.
- composed: plain differentiable operators around a differentiable all-reduce. For torch.compile, which fuses them
  itself, and for second derivatives.

Letters: N batch, C channels, M elements per channel over all ranks, P ranks.
Equations: Algorithm 1 and its gradients in Ioffe & Szegedy 2015; the message is [sum x, sum x^2, M_rank].
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn import ops
from syncbn.distributed import ID_LENGTH, Label, Reduction, all_reduce_differentiable


class Norm(NamedTuple):
    """One activation to normalise.

    x: (N, C, ...), floating point; weight, bias: (C) or None; residual: like x or None, added before the activation;
    activation: None or "relu".
    """

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    eps: float
    activation: str | None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        """The first four fields: what autograd sees."""
        return self[:4]


class Statistics(NamedTuple):
    """Of one activation over all ranks: mean and biased variance (C), and the count M (), all float64."""

    mean: Tensor
    var: Tensor
    count: Tensor


class Route(NamedTuple):
    """Whom an exchange is with: the group (None: this rank alone) and the labels of its two messages."""

    group: dist.ProcessGroup | None
    forward: Label
    backward: Label


class Memory:
    """Messages and their sums, kept so that a recomputed forward (activation checkpointing) need not reduce again.

    A recomputation is recognised by its local sums: the nearest remembered message is the one it repeats.
    """

    def __init__(self, size: int = 64) -> None:
        self.entries: deque[tuple[Tensor, Tensor]] = deque(maxlen=size)

    def keep(self, message: Tensor, totals: Tensor) -> None:
        """Remember what `message` was summed up to."""
        self.entries.append((message, totals))

    def recall(self, message: Tensor) -> Tensor:
        """The sums that went with `message`, found without reading a value on the host."""
        fitting = [(m, t) for m, t in self.entries if m.shape == message.shape and m.device == message.device]
        if len(fitting) == 1:
            return fitting[0][1]
        messages = torch.stack([m for m, _ in fitting])
        nearest = (messages - message).abs().amax(1).argmin()
        return torch.stack([t for _, t in fitting])[nearest]


def may_be_recomputed() -> bool:
    """Whether this forward runs inside an activation checkpoint, whose backward will run it again."""
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def is_recomputed() -> bool:
    """Whether this forward runs inside a backward pass."""
    return torch._C._current_graph_task_id() != -1


class Exchange:
    """What the two halves of one synchronisation share: the messages, forward and backward.

    Args:
        route: with whom.
        memory: where sums are kept for a recomputed forward.
    """

    def __init__(self, route: Route, memory: Memory | None = None) -> None:
        self.route, self.memory = route, memory
        self.recomputed = memory is not None and bool(memory.entries) and is_recomputed()
        self.reduction: Reduction | None = None
        self.gradient: list[_PendingGradient] | None = None

    def launch(self, inputs: Sequence[Tensor]) -> None:
        """Sum the inputs locally and send the message."""
        self.shifted: list[ops.Shifted] = []
        parts: list[Tensor] = []
        for x in inputs:
            sums, shifted = ops.input_sums(ops.dense(x))
            parts += [sums.view(-1), sums.new_full((1,), x.numel() // x.shape[1])]
            self.shifted.append(shifted)
        self.message = torch.cat([*parts, parts[0].new_zeros(ID_LENGTH)])
        self.local = self.message[:-ID_LENGTH]
        if self.memory is not None and not self.recomputed and may_be_recomputed():
            self.local = self.local.clone()
        if self.route.group is not None and not self.recomputed:
            self.reduction = Reduction(self.message, self.route.group, self.route.forward)

    def statistics(self) -> list[Statistics]:
        """Wait for the message; the statistics of each input.

        Raises:
            ValueError: one value per channel in all.
        """
        totals = self.local
        if self.recomputed:
            assert self.memory is not None
            totals = self.memory.recall(self.local)
        elif self.reduction is not None:
            totals = self.reduction.wait()
        if self.memory is not None and not self.recomputed and may_be_recomputed():
            self.memory.keep(self.local, totals)
        channels = [shifted.values.shape[1] for shifted in self.shifted]
        statistics = statistics_of(totals, channels)
        for s, shifted in zip(statistics, self.shifted, strict=True):
            self._refuse_single_value(s.count, shifted.values)
        self.reduction = None
        return statistics

    def launch_gradient(self, pending: "list[_PendingGradient]") -> None:
        """Send the sums of the backward."""
        self.gradient = pending
        self.gradient_reduction = None
        message = torch.cat([*(p.sums.view(-1) for p in pending), pending[0].sums.new_zeros(ID_LENGTH)])
        self.gradient_message = message[:-ID_LENGTH]
        if self.route.group is not None:
            self.gradient_reduction = Reduction(message, self.route.group, self.route.backward)

    def input_gradients(self, needed: Sequence[bool]) -> list[Tensor | None]:
        """Wait for the sums of the backward; dx of each input, None where not needed."""
        pending, self.gradient = self.gradient, None
        if pending is None:  # second derivatives were asked for: finish's node did it all
            return [None] * len(needed)
        reduction, self.gradient_reduction = self.gradient_reduction, None
        totals = self.gradient_message if reduction is None else reduction.wait()
        parts = totals.split([p.sums.numel() for p in pending])
        return [
            p.input_gradient(part.view(2, -1)) if wanted else None
            for p, part, wanted in zip(pending, parts, needed, strict=True)
        ]

    def _refuse_single_value(self, count: Tensor, x: Tensor) -> None:
        if self.route.group is None:
            single = x.numel() == x.shape[1]
        else:  # elsewhere than on a CPU, reading the count would stall the device
            single = count.device.type == "cpu" and count.item() == 1
        if single:
            P = 1 if self.route.group is None else self.route.group.size()
            raise ValueError(
                f"expected more than 1 value per channel when training, got 1 over all ranks ({P}); this rank's input "
                f"has size {list(x.shape)}: give a larger batch"
            )


class _PendingGradient(NamedTuple):
    """Of one activation, between the two passes of the backward."""

    dy: Tensor
    x: Tensor
    pivot: Tensor | None
    mean: Tensor
    var_eps: Tensor
    scale: Tensor
    count: Tensor
    sums: Tensor  # (2, C) float64: sum dy, sum dy * (x - mean)

    def input_gradient(self, totals: Tensor) -> Tensor:
        means = totals / self.count.clamp(min=1)
        return ops.input_gradient(
            self.dy, self.x, self.pivot, self.mean, self.scale, means[0], means[1] / self.var_eps
        )


def statistics_of(totals: Tensor, channels: Sequence[int]) -> list[Statistics]:
    """Mean, variance and count of each input from a message's sums: var = E[x^2] - E[x]^2, exact enough in float64."""
    statistics = []
    for part in totals.split([2 * C + 1 for C in channels]):
        count = part[-1]
        moments = (part[:-1] / count.clamp(min=1)).view(2, -1)
        mean = moments[0]
        var = torch.addcmul(moments[1], mean, mean, value=-1).clamp(min=0)
        statistics.append(Statistics(mean, var, count))
    return statistics


class _Start(torch.autograd.Function):
    """Inputs in, a token out that ties finish's node to this one."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *inputs: Tensor) -> Tensor:
        ctx.exchange = exchange
        exchange.launch(inputs)
        return inputs[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, _token: Tensor) -> Any:  # type: ignore[override]
        return (None, *ctx.exchange.input_gradients(ctx.needs_input_grad[1:]))


class _Finish(torch.autograd.Function):
    """Normalises. The inputs' gradients travel through the token, to start's node."""

    @staticmethod
    def forward(
        ctx: Any, exchange: Exchange, settings: list[tuple[float, str | None]], _token: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        norms = _norms(settings, tensors)
        ctx.exchange, ctx.settings = exchange, settings
        exchange.results = exchange.statistics()
        outputs, saved = [], []
        for norm, shifted, statistics in zip(norms, exchange.shifted, exchange.results, strict=True):
            y = _normalize(norm, shifted, statistics)
            outputs.append(y)
            masks = y if norm.activation == "relu" and norm.residual is not None else None
            saved += [*norm.tensors[:3], masks, shifted.pivot, *statistics]
        ctx.residuals = [norm.residual is not None for norm in norms]
        exchange.shifted = []
        ctx.save_for_backward(*saved)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:  # type: ignore[override]
        if torch.is_grad_enabled():
            return _composed_backward(ctx, gradients)
        saved, width = ctx.saved_tensors, 8
        pending: list[_PendingGradient] = []
        returned: list[Tensor | None] = []
        for i, ((eps, activation), dy) in enumerate(zip(ctx.settings, gradients, strict=True)):
            x, weight, bias, y, pivot, *statistics = saved[i * width : (i + 1) * width]
            x = ops.dense(x)
            norm, statistics = Norm(x, weight, bias, y, eps, activation), Statistics(*statistics)
            dy = _gradient_before_activation(norm, _laid_out_like(x, dy), pivot, statistics)
            pending.append(_pend(norm, dy, pivot, statistics))
            returned += _parameter_gradients(norm, pending[-1], ctx.residuals[i])
        if ctx.needs_input_grad[2]:
            ctx.exchange.launch_gradient(pending)
        return (None, None, gradients[0].new_zeros((), dtype=torch.float32), *returned)


def _norms(settings: Sequence[tuple[float, str | None]], tensors: Sequence[Any]) -> list[Norm]:
    return [Norm(*tensors[4 * i : 4 * i + 4], *setting) for i, setting in enumerate(settings)]


def _normalize(norm: Norm, shifted: ops.Shifted, statistics: Statistics) -> Tensor:
    own = shifted.values.data_ptr() != norm.x.data_ptr()
    mean, var, _ = statistics
    y = ops.normalize(shifted, mean, var, norm.eps, norm.weight, norm.bias, in_place=own)
    if norm.residual is not None:
        y = y.add_(norm.residual)
    if norm.activation == "relu":
        y = y.relu_()
    if y is norm.x:  # an empty input
        y = y.clone()
    return y.to(norm.x.dtype)


def _laid_out_like(x: Tensor, dy: Tensor) -> Tensor:
    if dy.stride() == x.stride():
        return dy
    return torch.empty_like(x, dtype=dy.dtype).copy_(dy)


def _gradient_before_activation(norm: Norm, dy: Tensor, pivot: Tensor | None, statistics: Statistics) -> Tensor:
    """dy where the ReLU let pass, else 0. Its mask is computed again from x, or read off y where a residual entered."""
    if norm.activation is None:
        return dy
    y = norm.residual
    if y is None:
        shifted = ops.shift(norm.x, pivot)
        y = ops.normalize(
            shifted, *statistics[:2], norm.eps, norm.weight, norm.bias, in_place=shifted.values is not norm.x
        )
    return torch.ops.aten.threshold_backward(dy, y, 0)


def _pend(norm: Norm, dy: Tensor, pivot: Tensor | None, statistics: Statistics) -> _PendingGradient:
    mean, var, count = statistics
    var_eps = var + norm.eps
    scale = var_eps.rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    sums = ops.gradient_sums(dy, norm.x, pivot, mean)
    return _PendingGradient(dy, norm.x, pivot, mean, var_eps, scale, count, sums)


def _parameter_gradients(norm: Norm, pending: _PendingGradient, residual: bool) -> tuple[Tensor | None, ...]:
    """Gradients of (x, weight, bias, residual); x's goes another way. This rank's share: DDP averages parameters'."""
    dweight = dbias = None
    if norm.weight is not None:
        dweight = (pending.sums[1] / pending.var_eps.sqrt()).to(norm.weight.dtype)
    if norm.bias is not None:
        dbias = pending.sums[0].to(norm.bias.dtype)
    return None, dweight, dbias, pending.dy if residual else None


def composed(norms: Sequence[Norm], route: Route) -> tuple[list[Tensor], list[Statistics]]:
    """The same normalisation as differentiable operators, for torch.compile and second derivatives."""
    parts, shifted = [], []
    for norm in norms:
        x = norm.x
        z, pivot = x.to(ops.compute_dtype(x.dtype)), None
        if x.numel():
            pivot = ops.pivot(x.detach())
            z = z - ops.per_channel(pivot, x)
        parts.append(ops.composed_sums(z, pivot))
        shifted.append(ops.Shifted(z, pivot))
    message = torch.cat(parts)
    totals = message if route.group is None else all_reduce_differentiable(message, route.group, route.forward)
    statistics = statistics_of(totals, [norm.x.shape[1] for norm in norms])
    outputs = [_composed_normalize(n, s, *st[:2]) for n, s, st in zip(norms, shifted, statistics, strict=True)]
    return outputs, statistics


def _composed_normalize(norm: Norm, shifted: ops.Shifted, mean: Tensor, var: Tensor) -> Tensor:
    z, pivot = shifted
    scale = (var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    centre = mean if pivot is None else mean - pivot
    y = (z - ops.per_channel(centre.to(z.dtype), z)) * ops.per_channel(scale.to(z.dtype), z)
    if norm.bias is not None:
        y = y + ops.per_channel(norm.bias.to(z.dtype), z)
    if norm.residual is not None:
        y = y + norm.residual
    if norm.activation == "relu":
        y = y.relu()
    return y.to(norm.x.dtype)


def _composed_backward(ctx: Any, gradients: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Finish's backward as differentiable operators: the whole gradient, computed through `composed`."""
    saved, width = ctx.saved_tensors, 8
    norms, dys = [], []
    for i, ((eps, activation), dy) in enumerate(zip(ctx.settings, gradients, strict=True)):
        x, weight, bias, y, pivot, mean, var, count = saved[i * width : (i + 1) * width]
        norms.append(Norm(x, weight, bias, None, eps, None))
        if activation == "relu":
            kept = Norm(x.detach(), weight, bias, y if y is None else y.detach(), eps, activation)
            with torch.no_grad():
                ones = _laid_out_like(kept.x, torch.ones_like(dy))
                mask = _gradient_before_activation(kept, ones, pivot, Statistics(mean, var, count))
            dy = dy * mask
        dys.append(dy)
    outputs, _ = composed(norms, ctx.exchange.route)
    tensors = [t for norm in norms for t in norm.tensors]
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, dys, create_graph=True, allow_unused=True))
    returned = [None if t is None or not t.requires_grad else next(found) for t in tensors]
    for i, residual in enumerate(ctx.residuals):
        returned[4 * i + 3] = dys[i] if residual else None
    return (None, None, None, *returned)


class Started:
    """A synchronisation under way; `finish` it once."""

    def __init__(self, inputs: Sequence[Tensor], route: Route, memory: Memory | None = None) -> None:
        self.inputs = list(inputs)
        self.exchange = Exchange(route, memory)
        self.token = _Start.apply(self.exchange, *self.inputs)

    def finish(self, norms: Sequence[Norm]) -> tuple[list[Tensor], list[Statistics]]:
        """Wait for the message and normalise; returns outputs like the inputs, and their statistics."""
        settings = [(norm.eps, norm.activation) for norm in norms]
        tensors = [t for norm in norms for t in norm.tensors]
        outputs = _Finish.apply(self.exchange, settings, self.token, *tensors)
        return list(outputs), self.exchange.results
