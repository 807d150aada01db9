"""Synchronised batch normalisation as a differentiable function, of one activation or of several in one message.

It comes in two halves, so that other work can run while a message travels: `start` sums locally and launches the
all-reduce, `Started.finish` waits for it and normalises. Going backward, finish's node launches the reduction of the
gradient sums and start's node waits for it; autograd runs what lies between the two in the meantime.

Two implementations of the same numbers; `graph` is the third, for torch.compile:
- fused: the passes of `syncbn.ops` inside two autograd nodes. The default.
- composed: plain differentiable operators around a differentiable all-reduce. For second derivatives, torch.func,
  forward-mode AD and torch.export.

Source: Algorithm 1 and its gradients in Ioffe & Szegedy 2015.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from syncbn import ops
from syncbn.functional.composed import composed
from syncbn.functional.exchange import Exchange, dense_part, gradients_of_inputs
from syncbn.functional.memory import Memory
from syncbn.functional.norm import Norm, Route, Statistics, cut_by_relu, refuse_single_value
from syncbn.recomputing import OutputsAgain, hooks_of_others, keep


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
        settings = [norm[4:] for norm in norms]
        tensors = [t for norm in norms for t in norm.tensors]
        outputs = _Finish.apply(self.exchange, settings, self.token, *tensors)
        self.exchange.remember(outputs)
        return list(outputs), self.exchange.results


def start(
    inputs: Sequence[Tensor], route: Route, memory: Memory, spans: Sequence[ops.Span | None] | None = None
) -> Started:
    """Sum inputs (N, C, ...), or the spans of them, locally and launch their one message."""
    exchange = Exchange(route, memory)
    return Started(exchange, _Start.apply(exchange, spans or [None] * len(inputs), *inputs))


def batch_norm(norms: Sequence[Norm]) -> tuple[list[Tensor], list[Statistics]]:
    """Normalise one activation by this rank's batch alone.

    Args:
        norms: one of the whole activation, or one for each span of it, in order.

    Returns:
        The output of each, and the statistics.

    Raises:
        ValueError: one value per channel.
    """
    x = norms[0].x
    M = x.numel() // x.shape[1]
    refuse_single_value(M, x.shape, P=1)
    found: list[Statistics] = []
    outputs = _Alone.apply(found, M, [norm[4:] for norm in norms], *(t for norm in norms for t in norm.tensors))
    return list(outputs), found


_Setting: TypeAlias = tuple[float, str | None, ops.Running | None, ops.Span | None]  # of a Norm, what is no tensor


class _Alone(torch.autograd.Function):
    """Normalisations of one activation by this rank's batch."""

    @staticmethod
    def forward(
        ctx: Any, found: list[Statistics], M: int, settings: list[_Setting], *tensors: Any
    ) -> tuple[Tensor, ...]:
        ctx.route, ctx.M = None, M
        norms = _norms(settings, tensors)
        pairs = [_normalize(norm, dense_part(norm.x, norm.span), None) for norm in norms]
        found += [Statistics(saved.mean, saved.var, M) for _, saved in pairs]
        return _keep(ctx, norms, pairs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        if _must_compose(gradients):
            return (None, None, None, *_composed_gradients(ctx, gradients))
        found, _ = ops.backward_sums(_upstream(ctx, gradients), None)
        dxs = gradients_of_inputs(
            [one for one, _ in found],
            [span for *_, span in ctx.settings],
            [gradient.sums for _, gradient in found],
            [ctx.M] * len(found),
            ctx.needs_input_grad[3::4],
        )
        return (None, None, None, *_returned(ctx, found, dxs))


class _Start(torch.autograd.Function):
    """Inputs in, a token out that ties finish's node to this one.

    The token holds no number, nor does its gradient. That one has an attribute `under_way`: what finish's node leaves
    to this one. So it belongs to one backward, of several there may be, and ends with it.
    """

    @staticmethod
    def forward(ctx: Any, exchange: Exchange, spans: Sequence[ops.Span | None], *inputs: Tensor) -> Tensor:
        ctx.exchange = exchange
        ctx.set_materialize_grads(False)
        exchange.launch(inputs, spans)
        return _token(inputs[0])

    @staticmethod
    def backward(ctx: Any, token: Any) -> Any:
        needed = ctx.needs_input_grad[2:]
        if token is None:  # second derivatives were asked for, and computed otherwise
            return (None, None, *[None] * len(needed))
        return (None, None, *ctx.exchange.input_gradients(token.under_way, needed))


class _Finish(torch.autograd.Function):
    """Normalises. The inputs' gradients travel through the token, to start's node."""

    @staticmethod
    def forward(
        ctx: Any, exchange: Exchange, settings: list[_Setting], _token: Tensor, *tensors: Any
    ) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.route = exchange, exchange.route
        exchange.receive()
        norms, pairs = _norms(settings, tensors), []
        for norm, x, batch in zip(norms, exchange.inputs, exchange.batches, strict=True):
            y, saved = _normalize(norm, x, batch)
            exchange.results.append(Statistics(saved.mean, saved.var, batch.M))
            pairs.append((y, saved))
        exchange.inputs, exchange.batches = [], []
        return _keep(ctx, norms, pairs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        if _must_compose(gradients):
            return (None, None, None, *_composed_gradients(ctx, gradients))
        upstream, token = _upstream(ctx, gradients), None
        if ctx.needs_input_grad[2]:
            token = _token(gradients[0])
            found, token.under_way = ctx.exchange.launch_gradient(upstream)
        else:
            found, _ = ops.backward_sums(upstream, None)
        return (None, None, token, *_returned(ctx, found, [None] * len(found)))


def _token(like: Tensor) -> Any:
    return like.new_empty(0, dtype=torch.float32)


class _Saved(NamedTuple):
    """What finish's node keeps of one normalisation."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None  # read only where `_reads_bias`; else whoever likes may change it, as with torch's layers
    y: Tensor | None  # only where the ReLU's mask cannot be computed again from x
    mean: Tensor
    var: Tensor

    def affine(self, setting: _Setting) -> ops.Affine:
        eps, activation, *_ = setting
        relu = activation == "relu" and self.y is None
        return ops.Affine(self.mean, self.var, eps, self.weight, self.bias, relu)


def _saved(ctx: Any) -> list[_Saved]:
    found: list[_Saved] = []
    rows = zip(*[iter(ctx.saved_tensors)] * len(_Saved._fields), strict=True)
    for row, bias in zip(rows, ctx.unread_biases, strict=True):
        one = _Saved(*row)
        if one.x is None:
            one = one._replace(x=found[-1].x)
        found.append(one if bias is None else one._replace(bias=bias.tensor))
    return found


def _reads_bias(norm: Norm, saved: _Saved) -> bool:
    """Whether the backward needs its values: for the ReLU's mask."""
    return norm.activation == "relu" and saved.y is None


def _norms(settings: Sequence[_Setting], tensors: Sequence[Any]) -> list[Norm]:
    quadruples = zip(*[iter(tensors)] * 4, strict=True)
    return [Norm._make((*four, *setting)) for four, setting in zip(quadruples, settings, strict=True)]


def _keep(ctx: Any, norms: Sequence[Norm], pairs: Sequence[tuple[Tensor, _Saved]]) -> tuple[Tensor, ...]:
    """Keep what the backward needs; returns the outputs."""
    outputs = tuple(y for y, _ in pairs)
    ctx.settings, ctx.residuals = [norm[4:] for norm in norms], [norm.residual is not None for norm in norms]
    # Of the spans of one input the first keeps it for all.
    inputs = [norm.x if norm.span is None or norm.span.first == 0 else None for norm in norms]
    kept, ctx.unread_biases = [], []
    for x, norm, (_, saved) in zip(inputs, norms, pairs, strict=True):
        unread = None if norm.bias is None or _reads_bias(norm, saved) else keep(norm.bias)
        kept += [x, saved.weight, saved.bias if unread is None else None, *saved[3:]]
        ctx.unread_biases.append(unread)
    ctx.save_for_backward(*kept)
    _offer_outputs_again(ctx, outputs)
    return outputs


def _returned(
    ctx: Any, found: Sequence[tuple[ops.Upstream, ops.Gradient]], dxs: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of the tensors of each norm."""
    returned: list[Tensor | None] = []
    for (one, gradient), dx, has_residual in zip(found, dxs, ctx.residuals, strict=True):
        returned += [dx, gradient.weight, gradient.bias, one.dy if has_residual else None]
    return returned


def _normalize(norm: Norm, x: Tensor, batch: ops.BatchSums | None) -> tuple[Tensor, _Saved]:
    """Y, and what the backward needs; x is the norm's part, as `dense_part`. Alone where there is no batch."""
    relu = norm.activation == "relu"
    residual = None if norm.residual is None else _laid_out_like(x, norm.residual)
    map = ops.Map(norm.eps, norm.weight, norm.bias, relu)
    y, mean, var = ops.normalize_batch(x, batch, map, residual, norm.running)
    mask = y if relu and residual is not None else None
    return y, _Saved(norm.x, norm.weight, norm.bias, mask, mean, var)


def _offer_outputs_again(ctx: Any, outputs: Sequence[Tensor]) -> None:
    """For `recomputing`: an output without a residual follows from what the backward keeps anyway.

    Not inside a checkpoint, which lets nobody look at that twice.
    """
    if hooks_of_others() or torch.is_inference_mode_enabled():
        return
    pairs = zip(outputs, ctx.residuals, strict=True)
    ctx.outputs_again = OutputsAgain([None if residual else y._version for y, residual in pairs], _output_again)


def _output_again(ctx: Any, i: int) -> Tensor:
    saved, setting = _saved(ctx)[i], ctx.settings[i]
    if ctx.unread_biases[i] is not None:  # until now
        ctx.unread_biases[i].unchanged()
    return ops.normalize(dense_part(saved.x, setting[-1]), saved.affine(setting))


def _upstream(ctx: Any, gradients: Sequence[Tensor]) -> list[ops.Upstream]:
    """What the backward starts from. The parameters' gradients will be this rank's share: DDP averages them."""
    upstream = []
    for saved, dy, setting in zip(_saved(ctx), gradients, ctx.settings, strict=True):
        x = dense_part(saved.x, setting[-1])
        dy = _laid_out_like(x, dy) if saved.y is not None else ops.upstream_gradient(dy, x)
        upstream.append(ops.Upstream(dy, x, saved.affine(setting), saved.y))
    return upstream


def _laid_out_like(x: Tensor, other: Tensor) -> Tensor:
    """The other in the layout and dtype of x."""
    if other.stride() == x.stride() and other.dtype == x.dtype and ops.as_stored(other):
        return other
    return ops.copy_like(x, other)


def _must_compose(gradients: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() or ops.need_operators(gradients) or ops.are_batched(gradients)


def _composed_gradients(ctx: Any, gradients: Sequence[Tensor]) -> list[Tensor | None]:
    """All of finish's gradients through `composed`, differentiable again where gradients are enabled."""
    differentiable = torch.is_grad_enabled()
    norms, dys = [], []
    with torch.enable_grad():
        for saved, dy, setting in zip(_saved(ctx), gradients, ctx.settings, strict=True):
            eps, activation, _, span = setting
            part = saved.x if span is None else span.of(saved.x)
            # Views, since one tensor in two norms would be given the gradient of both twice.
            weight, bias = (None if t is None else t.view_as(t) for t in (saved.weight, saved.bias))
            norms.append(Norm(part.view_as(part), weight, bias, None, eps, None))
            dys.append(dy * _relu_mask(saved, setting) if activation == "relu" else dy)
        outputs, _ = composed(norms, ctx.route)
        tensors = [t for norm in norms for t in norm.tensors]
        wanted = [t for t in tensors if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(outputs, wanted, dys, create_graph=differentiable, allow_unused=True))
    returned = [None if t is None or not t.requires_grad else next(found) for t in tensors]
    for i, (has_residual, (*_, span)) in enumerate(zip(ctx.residuals, ctx.settings, strict=True)):
        returned[4 * i + 3] = dys[i] if has_residual else None
        if span is not None:
            returned[4 * i] = span.among_zeros(returned[4 * i])
    return returned


@torch.no_grad()
def _relu_mask(saved: _Saved, setting: _Setting) -> Tensor:
    """1 where the ReLU let pass, else 0."""
    y = saved.y
    if y is None:
        y = ops.normalize(dense_part(saved.x, setting[-1]), saved.affine(setting))
    return cut_by_relu(torch.ones_like(y), y)
