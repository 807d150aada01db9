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
from syncbn.exchange import (
    Exchange,
    Memory,
    PendingGradient,
    Route,
    Statistics,
    message_of,
    moments,
    refuse_single_value,
    statistics_of,
)


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


def batch_norm(norm: Norm) -> tuple[Tensor, Statistics]:
    """Normalise by this rank's batch alone; the output like the input, and the statistics.

    Raises:
        ValueError: one value per channel.
    """
    M = norm.x.numel() // norm.x.shape[1]
    refuse_single_value(M, norm.x.shape, P=1)
    found: list[Statistics] = []
    return _Alone.apply(found, M, norm.eps, norm.activation, *norm.tensors), found[0]


def composed(norms: Sequence[Norm], route: Route | None) -> tuple[list[Tensor], list[Statistics]]:
    """The same normalisation as differentiable operators, over a group or, with no route, alone."""
    shifted = [_shifted(norm.x) for norm in norms]
    sums = [ops.composed_sums(s.values) for s in shifted]
    counts = [norm.x.numel() // norm.x.shape[1] for norm in norms]
    if route is None:
        for M, norm in zip(counts, norms, strict=True):
            refuse_single_value(M, norm.x.shape, P=1)
        statistics = [moments(*s, M, x.pivot) for s, x, M in zip(sums, shifted, counts, strict=True)]
    else:
        sums = [ops.about_origin(s, x.pivot, M) for s, x, M in zip(sums, shifted, counts, strict=True)]
        # The layers' names are out of a tracer's reach; their widths are not.
        id = 1 + sum(i * norm.x.shape[1] for i, norm in enumerate(norms, 1)) % 2**20
        message = message_of([t for s in sums for t in s], counts, (id, id**2))
        totals = all_reduce_differentiable(message, route.group, id)
        statistics = statistics_of(totals, [norm.x.shape[1] for norm in norms])
    outputs = [_composed_normalize(n, s, *st[:2]) for n, s, st in zip(norms, shifted, statistics, strict=True)]
    return outputs, statistics


class _Alone(torch.autograd.Function):
    """One normalisation by this rank's batch."""

    @staticmethod
    def forward(ctx: Any, found: list[Statistics], M: int, eps: float, activation: str | None, *tensors: Any) -> Tensor:
        x, weight, bias, residual = tensors
        norm = Norm(x, weight, bias, residual, eps, activation)
        sums, shifted = ops.input_sums(ops.dense(norm.x))
        found.append(moments(*sums, M, shifted.pivot))
        y, saved = _normalize(norm, shifted, found[0])
        ctx.settings, ctx.residuals, ctx.route, ctx.M = [(eps, activation)], [norm.residual is not None], None, M
        ctx.save_for_backward(*saved)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> Any:
        if torch.is_grad_enabled():
            return (None, None, None, None, *_composed_gradients(ctx, [dy]))
        saved, dy, invstd, scale = _before_sums(ctx, 0, _saved(ctx)[0], dy)
        whole = ops.whole_gradient(dy, saved.x, saved.pivot, saved.centre, invstd, saved.weight)
        dx, sums = whole or (None, ops.gradient_sums(dy, saved.x, saved.pivot, saved.centre))
        pending = PendingGradient(dy, saved.x, saved.pivot, saved.centre, invstd, scale, ctx.M, sums)
        _, dweight, dbias, dresidual = _parameter_gradients(saved, pending, ctx.residuals[0])
        if dx is None and ctx.needs_input_grad[4]:
            dx = pending.input_gradient(*sums)
        return None, None, None, None, dx, dweight, dbias, dresidual


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
        ctx.exchange, ctx.settings, ctx.route = exchange, settings, exchange.route
        exchange.receive()
        quadruples = zip(*[iter(tensors)] * 4, strict=True)
        norms = [Norm(x, w, b, r, *setting) for (x, w, b, r), setting in zip(quadruples, settings, strict=True)]
        outputs: list[Tensor] = []
        kept: list[Tensor | None] = []
        for norm, shifted, statistics in zip(norms, exchange.shifted, exchange.results, strict=True):
            y, saved = _normalize(norm, shifted, statistics)
            outputs.append(y)
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
        for i, (saved, dy, statistics) in enumerate(zip(_saved(ctx), gradients, ctx.exchange.results, strict=True)):
            saved, dy, invstd, scale = _before_sums(ctx, i, saved, dy)
            sums = ops.gradient_sums(dy, saved.x, saved.pivot, saved.centre)
            p = PendingGradient(dy, saved.x, saved.pivot, saved.centre, invstd, scale, statistics.M, sums)
            pending.append(p)
            returned += _parameter_gradients(saved, p, ctx.residuals[i])
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


def _normalize(norm: Norm, shifted: ops.Shifted, statistics: Statistics) -> tuple[Tensor, _Saved]:
    dtype = shifted.values.dtype
    centre = statistics.mean if shifted.pivot is None else statistics.mean - shifted.pivot
    saved = _Saved(norm.x, norm.weight, norm.bias, None, shifted.pivot, centre.to(dtype), statistics.var.to(dtype))
    if norm.x.numel() == 0:
        return torch.empty_like(norm.x), saved
    own = shifted.values.data_ptr() != norm.x.data_ptr()
    y = ops.normalize(shifted, saved.centre, saved.var, norm.eps, norm.weight, norm.bias, in_place=own)
    if norm.residual is not None:
        y = y.add_(norm.residual)
    if norm.activation == "relu":
        y = y.relu_()
    y = y.to(norm.x.dtype)
    return y, saved._replace(y=y) if norm.activation == "relu" and norm.residual is not None else saved


def _before_sums(ctx: Any, i: int, saved: _Saved, dy: Tensor) -> tuple[_Saved, Tensor, Tensor, Tensor]:
    """What both passes of the backward need: x and dy in one layout, dy before the ReLU, invstd and scale (C)."""
    eps, activation = ctx.settings[i]
    saved = saved._replace(x=ops.dense(saved.x))
    dy = _laid_out_like(saved.x, dy)
    if activation == "relu":
        dy = _gradient_before_relu(saved, eps, dy)
    invstd = (saved.var + eps).rsqrt_()
    return saved, dy, invstd, invstd if saved.weight is None else invstd * saved.weight


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
    outputs, _ = composed(norms, ctx.route)
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
