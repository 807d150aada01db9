"""Synchronised batch normalisation as a differentiable function, of one activation or of several in one message.

It comes in two halves, so that other work can run while a message travels: `start` sums locally and launches the
all-reduce, `FusedStarted.finish` waits for it and normalises. Going backward, finish's node launches the reduction of
the gradient sums and start's node waits for it; autograd runs what lies between the two in the meantime.

The passes of `syncbn.ops` run inside two autograd nodes; second derivatives are those of `composed`.

Source: Algorithm 1 and its gradients in Ioffe & Szegedy 2015.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn import ops
from syncbn.functional.composed import composed
from syncbn.functional.exchange import Exchange, dense_part, gradients_of_inputs
from syncbn.functional.memory import Memory
from syncbn.functional.norm import (
    Norm,
    Route,
    Settings,
    Statistics,
    Tensors,
    cut_by_relu,
    flatten,
    refuse_single_value,
    restore,
)
from syncbn.recomputing import OutputsAgain, hooks_of_others, keep


class FusedStarted:
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
        tensors, settings = zip(*norms, strict=True)
        outputs = _FusedFinish.apply(self.exchange, settings, self.token, *flatten(tensors))
        self.exchange.remember(outputs)
        return list(outputs), self.exchange.results


def start(
    inputs: Sequence[Tensor], route: Route, memory: Memory, spans: Sequence[ops.Span | None] | None = None
) -> FusedStarted:
    """Sum inputs (N, C, ...), or the spans of them, locally and launch their one message."""
    exchange = Exchange(route, memory)
    return FusedStarted(exchange, _FusedStart.apply(exchange, spans or [None] * len(inputs), *inputs))


def batch_norm(norms: Sequence[Norm]) -> tuple[list[Tensor], list[Statistics]]:
    """Normalise one activation by this rank's batch alone.

    Args:
        norms: one of the whole activation, or one for each span of it, in order.

    Returns:
        The output of each, and the statistics.

    Raises:
        ValueError: one value per channel.
    """
    x = norms[0].tensors.x
    M = x.numel() // x.shape[1]
    refuse_single_value(M, x.shape, P=1)
    found: list[Statistics] = []
    tensors, settings = zip(*norms, strict=True)
    outputs = _FusedAlone.apply(found, M, settings, *flatten(tensors))
    return list(outputs), found


class _FusedAlone(torch.autograd.Function):
    """Normalisations of one activation by this rank's batch."""

    @staticmethod
    def forward(
        ctx: Any, found: list[Statistics], M: int, settings: Sequence[Settings], *tensors: Any
    ) -> tuple[Tensor, ...]:
        ctx.route, ctx.M = None, M
        norms = _norms(tensors, settings)
        pairs = [_normalize(norm, dense_part(norm.tensors.x, norm.settings.span), None) for norm in norms]
        found += [Statistics(saved.mean, saved.var, M) for _, saved in pairs]
        return _keep(ctx, norms, pairs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        if _must_compose(gradients):
            return (None, None, None, *_composed_gradients(ctx, gradients))
        found, _ = ops.backward_sums(_upstream(ctx, gradients), None)
        dxs = gradients_of_inputs(
            [one for one, _ in found],
            [settings.span for settings in ctx.settings],
            [gradient.sums for _, gradient in found],
            [ctx.M] * len(found),
            [bool(needs.x) for needs in restore(Gradients, ctx.needs_input_grad[3:])],
        )
        return (None, None, None, *_returned(ctx, found, dxs))


class _FusedStart(torch.autograd.Function):
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


class _FusedFinish(torch.autograd.Function):
    """Normalises. The inputs' gradients travel through the token, to start's node."""

    @staticmethod
    def forward(
        ctx: Any, exchange: Exchange, settings: Sequence[Settings], _token: Tensor, *tensors: Any
    ) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.route = exchange, exchange.route
        exchange.receive()
        norms, pairs = _norms(tensors, settings), []
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


class Gradients(NamedTuple):
    """Of the `Tensors` of one normalization."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None


class _Saved(NamedTuple):
    """What finish's node keeps of one normalisation."""

    x: Any  # a tensor, but for the spans of one input after the first, which take the first's
    weight: Tensor | None
    bias: Tensor | None  # read only where `_reads_bias`; else whoever likes may change it, as with torch's layers
    y: Tensor | None  # only where the ReLU's mask cannot be computed again from x
    mean: Tensor
    var: Tensor

    def affine(self, settings: Settings) -> ops.Affine:
        relu = settings.activation == "relu" and self.y is None
        return ops.Affine(self.mean, self.var, settings.eps, self.weight, self.bias, relu)


def _saved(ctx: Any) -> list[_Saved]:
    found: list[_Saved] = []
    for one, bias in zip(restore(_Saved, ctx.saved_tensors), ctx.unread_biases, strict=True):
        if one.x is None:
            one = one._replace(x=found[-1].x)
        found.append(one if bias is None else one._replace(bias=bias.tensor))
    return found


def _norms(tensors: Sequence[Any], settings: Sequence[Settings]) -> list[Norm]:
    """From a node's flat tensors, and the settings of each normalization."""
    return [Norm(*pair) for pair in zip(restore(Tensors, tensors), settings, strict=True)]


def _reads_bias(settings: Settings, saved: _Saved) -> bool:
    """Whether the backward needs its values: for the ReLU's mask."""
    return settings.activation == "relu" and saved.y is None


def _keep(ctx: Any, norms: Sequence[Norm], pairs: Sequence[tuple[Tensor, _Saved]]) -> tuple[Tensor, ...]:
    """Keep what the backward needs; returns the outputs."""
    outputs = tuple(y for y, _ in pairs)
    ctx.settings = [norm.settings for norm in norms]
    ctx.residuals = [norm.tensors.residual is not None for norm in norms]
    kept, ctx.unread_biases = [], []
    for (tensors, settings), (_, saved) in zip(norms, pairs, strict=True):
        if settings.span is not None and settings.span.first:  # of the spans of one input the first keeps it for all
            saved = saved._replace(x=None)
        unread = None if tensors.bias is None or _reads_bias(settings, saved) else keep(tensors.bias)
        ctx.unread_biases.append(unread)
        kept.append(saved if unread is None else saved._replace(bias=None))
    ctx.save_for_backward(*flatten(kept))
    _offer_outputs_again(ctx, outputs)
    return outputs


def _returned(
    ctx: Any, found: Sequence[tuple[ops.Upstream, ops.Gradient]], dxs: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Gradients of the tensors of each norm."""
    return flatten(
        Gradients(dx, gradient.weight, gradient.bias, one.dy if has_residual else None)
        for (one, gradient), dx, has_residual in zip(found, dxs, ctx.residuals, strict=True)
    )


def _normalize(norm: Norm, x: Tensor, batch: ops.BatchSums | None) -> tuple[Tensor, _Saved]:
    """Y, and what the backward needs; x is the norm's part, as `dense_part`. Alone where there is no batch."""
    (input, weight, bias, residual), settings = norm
    relu = settings.activation == "relu"
    residual = None if residual is None else _laid_out_like(x, residual)
    map = ops.Map(settings.eps, weight, bias, relu)
    y, mean, var = ops.normalize_batch(x, batch, map, residual, settings.running)
    mask = y if relu and residual is not None else None
    return y, _Saved(input, weight, bias, mask, mean, var)


def _offer_outputs_again(ctx: Any, outputs: Sequence[Tensor]) -> None:
    """For `recomputing`: an output without a residual follows from what the backward keeps anyway.

    Not inside a checkpoint, which lets nobody look at that twice.
    """
    if hooks_of_others() or torch.is_inference_mode_enabled():
        return
    pairs = zip(outputs, ctx.residuals, strict=True)
    ctx.outputs_again = OutputsAgain([None if residual else y._version for y, residual in pairs], _output_again)


def _output_again(ctx: Any, i: int) -> Tensor:
    saved, settings = _saved(ctx)[i], ctx.settings[i]
    if ctx.unread_biases[i] is not None:  # until now
        ctx.unread_biases[i].unchanged()
    return ops.normalize(dense_part(saved.x, settings.span), saved.affine(settings))


def _upstream(ctx: Any, gradients: Sequence[Tensor]) -> list[ops.Upstream]:
    """What the backward starts from. The parameters' gradients will be this rank's share: DDP averages them."""
    upstream = []
    for saved, dy, settings in zip(_saved(ctx), gradients, ctx.settings, strict=True):
        x = dense_part(saved.x, settings.span)
        dy = _laid_out_like(x, dy) if saved.y is not None else ops.upstream_gradient(dy, x)
        upstream.append(ops.Upstream(dy, x, saved.affine(settings), saved.y))
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
        for saved, dy, settings in zip(_saved(ctx), gradients, ctx.settings, strict=True):
            part = saved.x if settings.span is None else settings.span.of(saved.x)
            # Views, since one tensor in two norms would be given the gradient of both twice.
            weight, bias = (None if t is None else t.view_as(t) for t in (saved.weight, saved.bias))
            tensors = Tensors(part.view_as(part), weight, bias, None)
            norms.append(Norm(tensors, Settings(settings.eps, None)))
            dys.append(dy * _relu_mask(saved, settings) if settings.activation == "relu" else dy)
        outputs, _ = composed(norms, ctx.route)
        inputs = flatten(norm.tensors for norm in norms)
        wanted = [t for t in inputs if t is not None and t.requires_grad]
        found = iter(torch.autograd.grad(outputs, wanted, dys, create_graph=differentiable, allow_unused=True))
    returned = restore(Gradients, [None if t is None or not t.requires_grad else next(found) for t in inputs])
    for i, (dy, settings) in enumerate(zip(dys, ctx.settings, strict=True)):
        if ctx.residuals[i]:
            returned[i] = returned[i]._replace(residual=dy)
        if settings.span is not None:
            returned[i] = returned[i]._replace(x=settings.span.among_zeros(returned[i].x))
    return flatten(returned)


@torch.no_grad()
def _relu_mask(saved: _Saved, settings: Settings) -> Tensor:
    """1 where the ReLU let pass, else 0."""
    y = saved.y
    if y is None:
        y = ops.normalize(dense_part(saved.x, settings.span), saved.affine(settings))
    return cut_by_relu(torch.ones_like(y), y)
