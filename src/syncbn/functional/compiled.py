"""Synchronised batch normalisation inside the graph that torch.compile makes.

The two passes that reduce are operators into which the compiler does not look: those of `syncbn.ops`, so that sums are
the ones of eager. All else is plain operators, for the compiler to fuse with what lies around: the normalisation with
residual and ReLU, and the gradient of the input.

As in `fused` there are two halves, so that other work can run while a message travels. Start: sums, and an
all-reduce that is not waited for. Finish: y. Going backward, finish's node sums and reduces; start's node waits, and
computes the gradients of the inputs. What it needs for that travels as gradients of tokens, which hold nothing else.

Letters: N batch, C channels, M elements per channel over all ranks.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from syncbn import ops
from syncbn.collectives.channel import ID_LENGTH
from syncbn.collectives.traced import launch_traced, nan_where_ranks_disagree, wait_traced
from syncbn.functional.exchange import batches_of
from syncbn.functional.norm import (
    Norm,
    Route,
    Statistics,
    cut_by_relu,
    flatten,
    id_of_widths,
    is_transformed,
    refuse_single_value,
    restore,
)


def is_traced() -> bool:
    """Whether torch.compile traces, and nothing that has to see through our operators does besides."""
    return torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting() and not is_transformed()


# The passes read what is dense in any layout, and copy the rest: the compiler need not.
_ANY_LAYOUT = (torch.Tag.flexible_layout,)


@torch.library.custom_op("syncbn::forward_message", mutates_args=(), tags=_ANY_LAYOUT)
def forward_message(inputs: Sequence[Tensor], id: int) -> Tensor:
    """This rank's forward message, see `ops.forward_message`, of inputs (N, C, ...)."""
    return ops.forward_message([ops.dense(x) for x in inputs], (id, id**2))


@forward_message.register_fake
def _(inputs: Sequence[Tensor], id: int) -> Tensor:
    length = sum(2 * x.shape[1] + 1 for x in inputs) + ID_LENGTH
    return _empty_message(inputs, length)


@torch.library.custom_op("syncbn::backward_sums", mutates_args=(), tags=_ANY_LAYOUT)
def backward_sums(
    gradients: Sequence[Tensor],
    inputs: Sequence[Tensor],
    means: Sequence[Tensor],
    vars: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    biases: Sequence[Tensor | None],
    eps: Sequence[float],
    relu: Sequence[bool],
) -> Tensor:
    """[sum dy (C), sum dy * (x - mean) (C)] of each input on this rank, float64; with relu, of dy cut by it."""
    upstream = []
    for dy, x, *map in zip(gradients, inputs, means, vars, eps, weights, biases, relu, strict=True):
        x = ops.dense(x)
        upstream.append(ops.Upstream(ops.upstream_gradient(dy, x), x, ops.Affine(*map), None))
    return ops.backward_sums(upstream, None)[1]


@backward_sums.register_fake
def _(gradients: Sequence[Tensor], inputs: Sequence[Tensor], *_: Any) -> Tensor:
    return _empty_message(inputs, sum(2 * x.shape[1] for x in inputs))


def _empty_message(inputs: Sequence[Tensor], length: int) -> Tensor:
    return inputs[0].new_empty(length, dtype=torch.float64, device=ops.statistics_device(inputs[0].device))


class CompiledStarted:
    """A synchronisation under way, as `fused.FusedStarted`; with no route, of this rank alone.

    Args:
        inputs: (N, C, ...) each.
        route: with whom.

    Raises:
        ValueError: one value per channel, alone. Over several ranks the outputs are NaN then, as on a GPU.
    """

    recomputed = False

    def __init__(self, inputs: Sequence[Tensor], route: Route | None) -> None:
        self.inputs, self.route = inputs, route
        self.group_name = None if route is None else route.group.group_name
        for x in inputs if route is None else ():
            refuse_single_value(x.numel() // x.shape[1], x.shape, P=1)
        self.id = id_of_widths([x.shape[1] for x in inputs])
        self.message, self.token, *tokens = _CompiledStart.apply(self.group_name, self.id, *inputs)
        self.tokens = restore(_Tokens, tokens)

    def finish(self, norms: Sequence[Norm]) -> tuple[list[Tensor], list[Statistics]]:
        """Wait for the message and normalise; as `fused.FusedStarted.finish`."""
        statistics = self._statistics()
        rows, rectified = [], []
        for x, (tensors, settings), found, tokens in zip(self.inputs, norms, statistics, self.tokens, strict=True):
            _, weight, bias, residual = tensors
            rows.append(_FinishInputs(*tokens, weight, bias, residual, x.detach(), *found))
            rectified.append((settings.eps, settings.activation == "relu"))
            if settings.running is not None:
                # Of a single value there is no variance: the outputs are NaN, the averages stay.
                mean, var, M = found
                assert isinstance(M, Tensor)
                ops.update_running(settings.running, mean, var, torch.where(M == 1, 0.0, M))
        outputs = _CompiledFinish.apply(self.group_name, tuple(rectified), self.token, *flatten(rows))
        return list(outputs), statistics

    def _statistics(self) -> list[Statistics]:
        totals = self.message
        if self.route is not None:
            totals = nan_where_ranks_disagree(wait_traced(totals), self.route.group, self.id)
        found = []
        for sums, M, _ in batches_of(totals, None, [x.shape[1] for x in self.inputs]):
            # var = E[x^2] - E[x]^2, which float64 can afford
            mean, var = ops.moments_of(ops.Sums(*sums.chunk(2)), None, M)
            if not isinstance(M, Tensor):
                raise RuntimeError("start_sync_batch_norm was compiled and finish() is not: compile both, or neither")
            found.append(Statistics(torch.where(M == 1, float("nan"), mean), var, M))
        return found


class _CompiledStart(torch.autograd.Function):
    """Inputs in; out the message, not waited for, and tokens that tie finish's node to this one.

    What counts about the tokens is their gradients, which finish's node makes: of the first, all inputs' coefficients
    a (C) and b (C), not waited for; of three for each input, scale * dy, and the two parts of the mean.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, ...]:
        # No names: where nothing needs a gradient, torch 2.13's tracer tells by their number whether there is a ctx.
        group_name, id, *inputs = arguments
        ctx.group_name = group_name
        ctx.save_for_backward(*inputs)
        message = forward_message(inputs, id)
        token = message.new_empty(sum(2 * x.shape[1] for x in inputs))
        tokens = flatten(_tokens_like(x) for x in inputs)
        if group_name is not None:
            message = launch_traced(message, group_name)
        ctx.mark_non_differentiable(message)
        return message, token, *tokens

    @staticmethod
    def backward(ctx: Any, _message: Tensor, coefficients: Tensor, *gradients: Tensor) -> Any:
        """Dx = scale * dy + a + b * (x - mean)."""
        if ctx.group_name is not None:
            coefficients = wait_traced(coefficients)
        inputs = ctx.saved_tensors
        parts = coefficients.split([2 * x.shape[1] for x in inputs])
        found = []
        for x, part, (scaled_dy, high, low) in zip(inputs, parts, restore(_Tokens, gradients), strict=True):
            a, b = (ops.per_channel(ops.beside(v, x).to(scaled_dy.dtype), x) for v in part.chunk(2))
            found.append((scaled_dy + a + b * _deviation(x, high, low)).to(x.dtype))
        return None, None, *found


class _Tokens(NamedTuple):
    """Of one input: what start's node hands to finish's, for their gradients alone."""

    scaled_dy: Any  # like the input
    high: Any  # (C)
    low: Any  # (C)


def _tokens_like(x: Tensor) -> _Tokens:
    """Without a value, in the compute dtype of x."""
    dtype = ops.compute_dtype(x.dtype)
    return _Tokens(torch.empty_like(x, dtype=dtype), *(x.new_empty(x.shape[1], dtype=dtype) for _ in range(2)))


class _FinishInputs(NamedTuple):
    """Of one input: the tensors that finish's node takes; their gradients, going backward."""

    scaled_dy: Any
    high: Any
    low: Any
    weight: Any
    bias: Any
    residual: Any
    x: Any = None
    mean: Any = None
    var: Any = None
    M: Any = None


_Rectified: TypeAlias = tuple[float, bool]  # eps, and whether there is a ReLU


class _CompiledFinish(torch.autograd.Function):
    """Normalises."""

    @staticmethod
    def forward(
        ctx: Any, group_name: str | None, settings: tuple[_Rectified, ...], _token: Tensor, *tensors: Any
    ) -> tuple[Tensor, ...]:
        ctx.group_name, ctx.settings = group_name, settings
        outputs: list[Tensor] = []
        kept: list[_Saved] = []
        for (eps, relu), row in zip(settings, restore(_FinishInputs, tensors), strict=True):
            _, _, _, weight, bias, residual, x, mean, var, M = row
            saved = _Saved(x, weight, bias, residual, None, mean, var, M, *_coefficients(x, mean, var, weight, eps))
            y = saved.normalized()
            if residual is not None:
                y = y + residual
            y = (y.relu() if relu else y).to(x.dtype)
            outputs.append(y)
            kept.append(saved._replace(y=y if relu and residual is not None else None))
        ctx.save_for_backward(*flatten(kept))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        saved = restore(_Saved, ctx.saved_tensors)
        dys = [dy if one.y is None else cut_by_relu(dy, one.y) for dy, one in zip(gradients, saved, strict=True)]
        all_eps = [eps for eps, _ in ctx.settings]
        relus = [relu and one.y is None for one, (_, relu) in zip(saved, ctx.settings, strict=True)]
        x, weight, bias, _, _, mean, var, *_ = zip(*saved, strict=True)
        sums = backward_sums(dys, x, mean, var, weight, bias, all_eps, relus).split([2 * len(v) for v in mean])
        shares = [one.shares(own, eps) for one, own, eps in zip(saved, sums, all_eps, strict=True)]
        message = torch.cat([v for pair in shares for v in pair])
        if ctx.group_name is not None:  # the compiler leaves it out where no input wants a gradient
            message = launch_traced(message, ctx.group_name)
        returned = [
            _FinishInputs(
                *(one.scaled(dy, relu), one.high, one.low),
                *one.parameter_gradients(own, eps),
                residual=None if one.residual is None else dy,
            )
            for one, dy, own, eps, relu in zip(saved, dys, sums, all_eps, relus, strict=True)
        ]
        return None, None, message, *flatten(returned)


class _Saved(NamedTuple):
    """What finish's node keeps of one normalisation, y = (x - high - low) * scale + bias."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    y: Tensor | None  # only where the ReLU's mask cannot be computed again from x
    mean: Tensor
    var: Tensor
    M: Tensor
    high: Tensor
    low: Tensor
    scale: Tensor

    def normalized(self) -> Tensor:
        """Y before residual and ReLU, in the compute dtype."""
        y = _deviation(self.x, self.high, self.low) * ops.per_channel(self.scale, self.x)
        return y if self.bias is None else y + ops.per_channel(self.bias.to(y.dtype), self.x)

    def scaled(self, dy: Tensor, relu: bool) -> Tensor:
        """Scale * dy in the compute dtype, cut by the ReLU."""
        dy = dy.to(self.scale.dtype)
        return (cut_by_relu(dy, self.normalized()) if relu else dy) * ops.per_channel(self.scale, dy)

    def shares(self, sums: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """This rank's part of a (C) and b (C) in dx = scale * dy + a + b * (x - mean)."""
        total, dot = sums.chunk(2)
        variance = self.var + eps
        share = variance.rsqrt() / -ops.at_least_one(self.M)
        if self.weight is not None:
            share = share * ops.as_statistic(self.weight)
        return total * share, dot / variance * share

    def parameter_gradients(self, sums: Tensor, eps: float) -> tuple[Tensor | None, Tensor | None]:
        """Of weight and bias."""
        total, dot = sums.chunk(2)
        found = ((self.weight, dot * (self.var + eps).rsqrt()), (self.bias, total))
        weight, bias = (None if v is None else gradient.to(v.dtype).to(v.device) for v, gradient in found)
        return weight, bias


def _coefficients(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, ...]:
    """High and low, whose sum is the mean, and scale, (C) each in the compute dtype of x."""
    dtype = ops.compute_dtype(x.dtype)
    high = mean.to(dtype)
    low = mean - high
    scale = ops.beside((var + eps).rsqrt(), x)
    scale = scale if weight is None else scale * weight
    # As strided, since the compiler would else compute them for each element of x, in float64.
    return tuple(
        v.as_strided(v.shape, (1,)) for v in (high.to(x.device), ops.beside(low, x).to(dtype), scale.to(dtype))
    )


def _deviation(x: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """X - mean in the compute dtype, exact also where the mean is large."""
    return x.to(high.dtype) - ops.per_channel(high, x) - ops.per_channel(low, x)
