"""Synchronised batch normalisation inside the graph that torch.compile makes.

The two passes that reduce are operators into which the compiler does not look: those of `syncbn.ops`, so that sums are
the ones of eager. All else is plain operators, for the compiler to fuse with what lies around: the normalisation with
residual and ReLU, and the gradient of the input.

As in `functional` there are two halves, so that other work can run while a message travels. Start: sums, and an
all-reduce that is not waited for. Finish: y. Going backward, finish's node sums and reduces; start's node waits, and
computes the gradients of the inputs. What it needs for that travels as gradients of tokens, which hold nothing else.

Letters: N batch, C channels, M elements per channel over all ranks.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from syncbn import ops
from syncbn.distributed import ID_LENGTH, launch_traced, nan_where_ranks_disagree, wait_traced
from syncbn.exchange import Route, Statistics, batches_of, refuse_single_value
from syncbn.functional import Norm


def is_traced() -> bool:
    """Whether torch.compile traces, so that the layers' part of the graph is to be made here."""
    return torch.compiler.is_dynamo_compiling() and not torch.compiler.is_exporting()


# The passes read what is dense in any layout, and copy the rest: the compiler need not.
_ANY_LAYOUT = (torch.Tag.flexible_layout,)


@torch.library.custom_op("syncbn::forward_message", mutates_args=(), tags=_ANY_LAYOUT)
def forward_message(inputs: Sequence[Tensor], id: int) -> Tensor:
    """This rank's forward message, see `ops.forward_message`, of inputs (N, C, ...)."""
    return ops.forward_message([ops.dense(x) for x in inputs], (id, id**2))


@forward_message.register_fake
def _(inputs: Sequence[Tensor], id: int) -> Tensor:
    length = sum(2 * x.shape[1] + 1 for x in inputs) + ID_LENGTH
    return inputs[0].new_empty(length, dtype=torch.float64)


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
    return inputs[0].new_empty(sum(2 * x.shape[1] for x in inputs), dtype=torch.float64)


class Started:
    """A synchronisation under way, as `functional.Started`; with no route, of this rank alone.

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
        # The layers' names are out of a tracer's reach; their widths are not.
        self.id = 1 + sum(i * x.shape[1] for i, x in enumerate(inputs, 1)) % 2**20
        self.totals, self.sums_token, *self.tokens = _Start.apply(self.group_name, self.id, *inputs)

    def finish(self, norms: Sequence[Norm]) -> tuple[list[Tensor], list[Statistics]]:
        """Wait for the message and normalise; as `functional.Started.finish`."""
        statistics = self._statistics()
        rows = zip(self.inputs, self.tokens[::2], self.tokens[1::2], norms, statistics, strict=True)
        settings = tuple((norm.eps, norm.activation == "relu", norm.residual is not None) for norm in norms)
        tensors = [
            t
            for x, token, mean_token, norm, one in rows
            for t in (token, mean_token, x.detach(), norm.weight, norm.bias, norm.residual, *one)
        ]
        outputs = _Finish.apply(self.group_name, settings, self.sums_token, *tensors)
        for norm, one in zip(norms, statistics, strict=True):
            if norm.running is not None:
                ops.update_running(norm.running, *one)
        return list(outputs), statistics

    def _statistics(self) -> list[Statistics]:
        totals = self.totals
        if self.route is not None:
            totals = nan_where_ranks_disagree(wait_traced(totals), self.route.group, self.id)
        found = []
        for sums, M, _ in batches_of(totals, None, [x.shape[1] for x in self.inputs]):
            # var = E[x^2] - E[x]^2, which float64 can afford
            mean, var = ops.moments_of(ops.Sums(*sums.chunk(2)), None, M)
            found.append(Statistics(torch.where(M == 1, float("nan"), mean), var, M))
        return found


class _Start(torch.autograd.Function):
    """Inputs in; out the message, not waited for, and tokens that tie finish's node to this one.

    What is of interest about the tokens is their gradients, from finish's node: of the first the coefficients (C) a
    and b of every input, not waited for; of two for each input, scale * dy and the mean.
    """

    @staticmethod
    def forward(ctx: Any, group_name: str | None, id: int, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.group_name = group_name
        ctx.save_for_backward(*inputs)
        message = forward_message(inputs, id)
        totals = message if group_name is None else launch_traced(message, group_name)
        ctx.mark_non_differentiable(totals)
        tokens = [message.new_empty(sum(2 * x.shape[1] for x in inputs))]
        for x in inputs:
            tokens += [torch.empty_like(x, dtype=ops.compute_dtype(x.dtype)), message.new_empty(x.shape[1])]
        return totals, *tokens

    @staticmethod
    def backward(ctx: Any, _totals: Tensor, coefficients: Tensor, *gradients: Tensor) -> Any:
        """Dx = scale * dy + a + b * (x - mean)."""
        if ctx.group_name is not None:
            coefficients = wait_traced(coefficients)
        inputs = ctx.saved_tensors
        parts = coefficients.split([2 * x.shape[1] for x in inputs])
        found = []
        for x, part, scaled_dy, mean in zip(inputs, parts, gradients[::2], gradients[1::2], strict=True):
            a, b = (ops.per_channel(v.to(scaled_dy.dtype), x) for v in part.chunk(2))
            found.append((scaled_dy + a + b * _deviation(x, mean)).to(x.dtype))
        return None, None, *found


_PER_INPUT = 9  # arguments of finish's node


class _Finish(torch.autograd.Function):
    """Normalises."""

    @staticmethod
    def forward(
        ctx: Any,
        group_name: str | None,
        settings: tuple[tuple[float, bool, bool], ...],
        _sums_token: Tensor,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        ctx.group_name, ctx.settings = group_name, settings
        outputs, kept = [], []
        for (eps, relu, _), row in zip(settings, zip(*[iter(tensors)] * _PER_INPUT, strict=True), strict=True):
            _, _, x, weight, bias, residual, mean, var, M = row
            y = _affine(_deviation(x, mean), _scale(var, eps, weight), bias)
            if residual is not None:
                y = y + residual
            outputs.append((y.relu() if relu else y).to(x.dtype))
            mask = outputs[-1] if relu and residual is not None else None
            kept += [x, weight, bias, mean, var, M, mask]
        ctx.save_for_backward(*kept)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        rows = [_Saved(*row) for row in zip(*[iter(ctx.saved_tensors)] * len(_Saved._fields), strict=True)]
        upstream = [
            dy if y is None else torch.ops.aten.threshold_backward(dy, y, 0)
            for dy, y in zip(gradients, [one.y for one in rows], strict=True)
        ]
        relus = [relu and one.y is None for one, (_, relu, _) in zip(rows, ctx.settings, strict=True)]
        all_eps = [eps for eps, _, _ in ctx.settings]
        x, weight, bias, mean, var, _, _ = zip(*rows, strict=True)
        sums = backward_sums(upstream, x, mean, var, weight, bias, all_eps, relus)
        coefficients: list[Tensor] = []
        returned: list[Tensor | None] = []
        parts = sums.split([2 * len(one.mean) for one in rows])
        for one, dy, part, eps, relu, (_, _, has_residual) in zip(
            rows, upstream, parts, all_eps, relus, ctx.settings, strict=True
        ):
            total, dot = part.chunk(2)
            scale = _scale(one.var, eps, one.weight)
            share = scale / -ops.at_least_one(one.M)
            coefficients += [total * share, dot / (one.var + eps) * share]
            scaled = dy
            if relu:
                scaled = torch.ops.aten.threshold_backward(
                    dy.to(ops.compute_dtype(dy.dtype)), _affine(_deviation(one.x, one.mean), scale, one.bias), 0
                )
            scaled = scaled * ops.per_channel(scale.to(ops.compute_dtype(dy.dtype)), dy)
            returned += [
                scaled,
                one.mean,
                None,
                None if one.weight is None else (dot * (one.var + eps).rsqrt()).to(one.weight.dtype),
                None if one.bias is None else total.to(one.bias.dtype),
                dy if has_residual else None,
                None,
                None,
                None,
            ]
        message = None
        if ctx.needs_input_grad[2]:
            message = torch.cat(coefficients)
            message = message if ctx.group_name is None else launch_traced(message, ctx.group_name)
        return None, None, message, *returned


class _Saved(NamedTuple):
    """What finish's node keeps of one normalisation."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    var: Tensor
    M: Tensor
    y: Tensor | None  # only where the ReLU's mask cannot be computed again from x


def _scale(var: Tensor, eps: float, weight: Tensor | None) -> Tensor:
    scale = (var + eps).rsqrt()
    return scale if weight is None else scale * weight


def _deviation(x: Tensor, mean: Tensor) -> Tensor:
    """X - mean in the compute dtype, exact where the mean is large."""
    dtype = ops.compute_dtype(x.dtype)
    high = mean.to(dtype)
    low = (mean - high).to(dtype)
    return x.to(dtype) - ops.per_channel(high, x) - ops.per_channel(low, x)


def _affine(deviation: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    y = deviation * ops.per_channel(scale.to(deviation.dtype), deviation)
    return y if bias is None else y + ops.per_channel(bias.to(deviation.dtype), deviation)
