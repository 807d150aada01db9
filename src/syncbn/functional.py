"""Synchronised batch normalisation as a differentiable function, of one activation or of several in one message.

It comes in two halves, so that other work can run while a message travels: `start` sums locally and launches the
all-reduce, `Started.finish` waits for it and normalises. Going backward, finish's node launches the reduction of the
gradient sums and start's node waits for it; autograd runs what lies between the two in the meantime.

Two implementations of the same numbers:
- fused: the passes of `syncbn.ops` inside two autograd nodes. The default.
- composed: plain differentiable operators around a differentiable all-reduce. For torch.compile, which fuses them
  itself, and for second derivatives.

Source: Algorithm 1 and its gradients in Ioffe & Szegedy 2015.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn import ops
from syncbn.distributed import all_reduce_differentiable
from syncbn.exchange import Exchange, Memory, PendingGradient, Route, Statistics, message_of, statistics_of


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
        """What autograd sees: the first four fields."""
        return self[:4]


class Started:
    """A synchronisation under way; made by `start`, to be finished once."""

    def __init__(self, exchange: Exchange, token: Tensor) -> None:
        self.exchange, self.token = exchange, token

    @property
    def recomputed(self) -> bool:
        """Whether this repeats a forward inside an activation checkpoint, so that nothing may be updated again."""
        return self.exchange.recomputed

    def finish(self, norms: Sequence[Norm]) -> tuple[list[Tensor], list[Statistics]]:
        """Wait for the message and normalise.

        Args:
            norms: for each input of `start`, in its order.

        Returns:
            Outputs like the inputs, and the statistics of each.
        """
        settings = [(norm.eps, norm.activation) for norm in norms]
        tensors = [t for norm in norms for t in norm.tensors]
        outputs = _Finish.apply(self.exchange, settings, self.token, *tensors)
        return list(outputs), self.exchange.results


def start(inputs: Sequence[Tensor], route: Route, memory: Memory) -> Started:
    """Sum inputs (N, C, ...) locally and launch their one message."""
    exchange = Exchange(route, memory)
    return Started(exchange, _Start.apply(exchange, *inputs))


def composed(norms: Sequence[Norm], route: Route) -> tuple[list[Tensor], list[Statistics]]:
    """Start and finish as differentiable operators, for torch.compile and second derivatives."""
    shifted = [_shifted(norm.x) for norm in norms]
    counts = [norm.x.numel() // norm.x.shape[1] for norm in norms]
    message = message_of([t for s in shifted for t in ops.composed_sums(s)], counts, route.forward)
    totals = message if route.group is None else all_reduce_differentiable(message, route.group, route.forward)
    statistics = statistics_of(totals, [norm.x.shape[1] for norm in norms])
    outputs = [_composed_normalize(n, s, *st[:2]) for n, s, st in zip(norms, shifted, statistics, strict=True)]
    return outputs, statistics


class _Start(torch.autograd.Function):
    """Inputs in, a token out that ties finish's node to this one."""

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, *inputs: Tensor) -> Tensor:
        ctx.exchange = exchange
        exchange.launch(inputs)
        return inputs[0].new_zeros((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, _token: Tensor) -> Any:
        return (None, *ctx.exchange.input_gradients(ctx.needs_input_grad[1:]))


class _Finish(torch.autograd.Function):
    """Normalises. The inputs' gradients travel through the token, to start's node."""

    @staticmethod
    def forward(
        ctx: Any, exchange: Exchange, settings: list[tuple[float, str | None]], _token: Tensor, *tensors: Any
    ) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.settings = exchange, settings
        exchange.receive()
        quadruples = zip(*[iter(tensors)] * 4, strict=True)
        norms = [Norm(x, w, b, r, *setting) for (x, w, b, r), setting in zip(quadruples, settings, strict=True)]
        outputs: list[Tensor] = []
        kept: list[Tensor | None] = []
        for norm, shifted, statistics in zip(norms, exchange.shifted, exchange.results, strict=True):
            dtype = shifted.values.dtype
            centre = statistics.mean if shifted.pivot is None else statistics.mean - shifted.pivot
            saved = _Saved(
                norm.x, norm.weight, norm.bias, None, shifted.pivot, centre.to(dtype), statistics.var.to(dtype)
            )
            outputs.append(_normalize(norm, shifted, saved))
            if norm.activation == "relu" and norm.residual is not None:
                saved = saved._replace(y=outputs[-1])
            kept += saved
        exchange.shifted = []
        ctx.residuals = [norm.residual is not None for norm in norms]
        ctx.save_for_backward(*kept)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        if torch.is_grad_enabled():
            return (None, None, None, *_composed_gradients(ctx, gradients))
        pending: list[PendingGradient] = []
        returned: list[Tensor | None] = []
        for i, (saved, dy) in enumerate(zip(_saved(ctx), gradients, strict=True)):
            eps, activation = ctx.settings[i]
            saved = saved._replace(x=ops.dense(saved.x))
            dy = _laid_out_like(saved.x, dy)
            if activation == "relu":
                dy = _gradient_before_relu(saved, eps, dy)
            pending.append(_pend(saved, eps, dy, ctx.exchange.results[i].M))
            returned += _parameter_gradients(saved, pending[-1], ctx.residuals[i])
        if ctx.needs_input_grad[2]:
            ctx.exchange.launch_gradient(pending)
        return (None, None, gradients[0].new_zeros((), dtype=torch.float32), *returned)


class _Saved(NamedTuple):
    """What finish's node keeps of one normalisation."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    y: Tensor | None  # only where the ReLU's mask cannot be computed again from x
    pivot: Tensor | None
    centre: Tensor
    var: Tensor


def _saved(ctx: Any) -> list[_Saved]:
    rows = zip(*[iter(ctx.saved_tensors)] * len(_Saved._fields), strict=True)
    return [_Saved(x, weight, bias, y, pivot, centre, var) for x, weight, bias, y, pivot, centre, var in rows]


def _normalize(norm: Norm, shifted: ops.Shifted, saved: _Saved) -> Tensor:
    if norm.x.numel() == 0:
        return torch.empty_like(norm.x)
    own = shifted.values.data_ptr() != norm.x.data_ptr()
    y = ops.normalize(shifted, saved.centre, saved.var, norm.eps, norm.weight, norm.bias, in_place=own)
    if norm.residual is not None:
        y = y.add_(norm.residual)
    if norm.activation == "relu":
        y = y.relu_()
    return y.to(norm.x.dtype)


def _laid_out_like(x: Tensor, dy: Tensor) -> Tensor:
    if dy.stride() == x.stride():
        return dy
    return torch.empty_like(x, dtype=dy.dtype).copy_(dy)


def _gradient_before_relu(saved: _Saved, eps: float, dy: Tensor) -> Tensor:
    """Dy where the ReLU let pass, else 0. Its mask is computed again from x, or read off y where a residual entered."""
    y = saved.y
    if y is None:
        shifted = ops.shift(saved.x, saved.pivot)
        own = shifted.values is not saved.x
        y = ops.normalize(shifted, saved.centre, saved.var, eps, saved.weight, saved.bias, in_place=own)
    return torch.ops.aten.threshold_backward(dy, y, 0)


def _pend(saved: _Saved, eps: float, dy: Tensor, M: float | Tensor) -> PendingGradient:
    invstd = (saved.var + eps).rsqrt_()
    scale = invstd if saved.weight is None else invstd * saved.weight
    sums = ops.gradient_sums(dy, saved.x, saved.pivot, saved.centre)
    return PendingGradient(dy, saved.x, saved.pivot, saved.centre, invstd, scale, M, sums)


def _parameter_gradients(saved: _Saved, pending: PendingGradient, residual: bool) -> tuple[Tensor | None, ...]:
    """Gradients of (x, weight, bias, residual); x's goes another way. This rank's share: DDP averages parameters'."""
    dweight = dbias = None
    if saved.weight is not None:
        dweight = (pending.sums.dot * pending.invstd).to(saved.weight.dtype)
    if saved.bias is not None:
        dbias = pending.sums.total.to(saved.bias.dtype)
    return None, dweight, dbias, pending.dy if residual else None


def _composed_gradients(ctx: Any, gradients: Sequence[Tensor]) -> list[Tensor | None]:
    """All of finish's gradients through `composed`, differentiable again."""
    norms, dys = [], []
    for saved, dy, (eps, activation) in zip(_saved(ctx), gradients, ctx.settings, strict=True):
        norms.append(Norm(saved.x, saved.weight, saved.bias, None, eps, None))
        if activation == "relu":
            with torch.no_grad():
                x = ops.dense(saved.x)
                mask = _gradient_before_relu(saved._replace(x=x), eps, _laid_out_like(x, torch.ones_like(dy)))
            dy = dy * mask
        dys.append(dy)
    outputs, _ = composed(norms, ctx.exchange.route)
    tensors = [t for norm in norms for t in norm.tensors]
    wanted = [t for t in tensors if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(outputs, wanted, dys, create_graph=True, allow_unused=True))
    returned = [None if t is None or not t.requires_grad else next(found) for t in tensors]
    for i, has_residual in enumerate(ctx.residuals):
        returned[4 * i + 3] = dys[i] if has_residual else None
    return returned


def _shifted(x: Tensor) -> ops.Shifted:
    z = x.to(ops.compute_dtype(x.dtype))
    if x.numel() == 0:
        return ops.Shifted(z, None)
    pivot = ops.pivot(x.detach())
    return ops.Shifted(z - ops.per_channel(pivot, x), pivot)


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
