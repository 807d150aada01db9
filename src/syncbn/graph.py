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
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from syncbn import ops
from syncbn.distributed import ID_LENGTH, launch_traced, nan_where_ranks_disagree, wait_traced
from syncbn.exchange import Route, Statistics, batches_of, refuse_single_value
from syncbn.functional import Norm, is_transformed


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


_Setting: TypeAlias = tuple[float, bool, bool]  # eps, whether there is a ReLU, and a residual


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
        self.totals, self.sums_token, *tokens = _Start.apply(self.group_name, self.id, *inputs)
        self.tokens = list(_rows(tokens, 3))

    def finish(self, norms: Sequence[Norm]) -> tuple[list[Tensor], list[Statistics]]:
        """Wait for the message and normalise; as `functional.Started.finish`."""
        statistics = self._statistics()
        settings, tensors = [], []
        for x, norm, found, tokens in zip(self.inputs, norms, statistics, self.tokens, strict=True):
            settings.append((norm.eps, norm.activation == "relu", norm.residual is not None))
            map = _map_of(x.dtype, found, norm)
            tensors += [*tokens, norm.weight, norm.bias, norm.residual, x.detach(), *found, *map]
            if norm.running is not None:
                ops.update_running(norm.running, *found)
        outputs = _Finish.apply(self.group_name, tuple(settings), self.sums_token, *tensors)
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


class _Map(NamedTuple):
    """y = (x - high - low) * scale + bias, (C) each in the compute dtype; high + low is the mean."""

    high: Tensor
    low: Tensor
    scale: Tensor
    bias: Tensor | None

    def deviation(self, x: Tensor) -> Tensor:
        """X - mean, exact also where the mean is large."""
        return _deviation(x, self.high, self.low)

    def __call__(self, x: Tensor) -> Tensor:
        y = self.deviation(x) * ops.per_channel(self.scale, x)
        return y if self.bias is None else y + ops.per_channel(self.bias, x)


def _deviation(x: Tensor, high: Tensor, low: Tensor) -> Tensor:
    return x.to(high.dtype) - ops.per_channel(high, x) - ops.per_channel(low, x)


def _map_of(dtype: torch.dtype, found: Statistics, norm: Norm) -> _Map:
    dtype = ops.compute_dtype(dtype)
    scale = (found.var + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.detach()
    high = found.mean.to(dtype)
    low = (found.mean - high).to(dtype)
    bias = None if norm.bias is None else norm.bias.detach().to(dtype)
    return _Map(_once(high), _once(low), _once(scale.to(dtype)), bias)


def _once(v: Tensor) -> Tensor:
    """V (C), computed once for each channel: the compiler would do so for each element of x, in float64."""
    return v.as_strided(v.shape, (1,))


class _Start(torch.autograd.Function):
    """Inputs in; out the message, not waited for, and tokens that tie finish's node to this one.

    What counts about the tokens is their gradients, which finish's node makes: of the first the coefficients a and b
    (C) of each input, not waited for; of three for each input scale * dy, and the two parts of the mean.
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
            dtype = ops.compute_dtype(x.dtype)
            tokens += [torch.empty_like(x, dtype=dtype), *(x.new_empty(x.shape[1], dtype=dtype) for _ in range(2))]
        return totals, *tokens

    @staticmethod
    def backward(ctx: Any, _totals: Tensor, coefficients: Tensor, *gradients: Tensor) -> Any:
        """Dx = scale * dy + a + b * (x - mean)."""
        if ctx.group_name is not None:
            coefficients = wait_traced(coefficients)
        inputs = ctx.saved_tensors
        parts = coefficients.split([2 * x.shape[1] for x in inputs])
        found = []
        for x, part, (scaled_dy, high, low) in zip(inputs, parts, _rows(gradients, 3), strict=True):
            a, b = (ops.per_channel(v.to(scaled_dy.dtype), x) for v in part.chunk(2))
            found.append((scaled_dy + a + b * _deviation(x, high, low)).to(x.dtype))
        return None, None, *found


class _Arguments(NamedTuple):
    """Finish's node's, for each input."""

    scaled_dy: Tensor
    high: Tensor
    low: Tensor
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    x: Tensor
    mean: Tensor
    var: Tensor
    M: Tensor
    map_high: Tensor
    map_low: Tensor
    map_scale: Tensor
    map_bias: Tensor | None


class _Saved(NamedTuple):
    """What finish's node keeps of one normalisation."""

    weight: Tensor | None
    bias: Tensor | None
    y: Tensor | None  # only where the ReLU's mask cannot be computed again from x
    x: Tensor
    mean: Tensor
    var: Tensor
    M: Tensor
    high: Tensor
    low: Tensor
    scale: Tensor
    map_bias: Tensor | None

    @property
    def map(self) -> _Map:
        return _Map(*self[-4:])


class _Finish(torch.autograd.Function):
    """Normalises."""

    @staticmethod
    def forward(
        ctx: Any, group_name: str | None, settings: tuple[_Setting, ...], _token: Tensor, *tensors: Any
    ) -> tuple[Tensor, ...]:
        ctx.group_name, ctx.settings = group_name, settings
        outputs, kept = [], []
        for (_, relu, _), row in zip(settings, _rows(tensors, len(_Arguments._fields)), strict=True):
            one = _Arguments(*row)
            y = _Map(*one[-4:])(one.x)
            if one.residual is not None:
                y = y + one.residual
            y = (y.relu() if relu else y).to(one.x.dtype)
            outputs.append(y)
            kept += [one.weight, one.bias, y if relu and one.residual is not None else None, *one[6:]]
        ctx.save_for_backward(*kept)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        saved = [_Saved(*row) for row in _rows(ctx.saved_tensors, len(_Saved._fields))]
        dys = [dy if one.y is None else _cut(dy, one.y) for dy, one in zip(gradients, saved, strict=True)]
        settings = [
            (eps, relu and one.y is None, added) for one, (eps, relu, added) in zip(saved, ctx.settings, strict=True)
        ]
        weight, bias, _, x, mean, var, *_ = zip(*saved, strict=True)
        eps, relus, _ = zip(*settings, strict=True)
        sums = backward_sums(dys, x, mean, var, weight, bias, eps, relus).split([2 * len(v) for v in mean])
        message = None
        if ctx.needs_input_grad[2]:
            message = torch.cat([v for pair in zip(saved, sums, eps, strict=True) for v in _coefficients(*pair)])
            message = message if ctx.group_name is None else launch_traced(message, ctx.group_name)
        returned: list[Tensor | None] = []
        for one, dy, own, setting in zip(saved, dys, sums, settings, strict=True):
            returned += _gradients(one, dy, own, setting)
        return None, None, message, *returned


def _coefficients(one: _Saved, sums: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """This rank's part of a and b (C) in dx = scale * dy + a + b * (x - mean)."""
    total, dot = sums.chunk(2)
    variance = one.var + eps
    share = variance.rsqrt() / -ops.at_least_one(one.M)
    if one.weight is not None:
        share = share * one.weight
    return total * share, dot / variance * share


def _gradients(one: _Saved, dy: Tensor, sums: Tensor, setting: _Setting) -> list[Tensor | None]:
    """Of `_Arguments`."""
    eps, relu, has_residual = setting
    scaled = dy.to(one.scale.dtype)
    if relu:
        scaled = _cut(scaled, one.map(one.x))
    scaled = scaled * ops.per_channel(one.scale, dy)
    total, dot = sums.chunk(2)
    dweight = None if one.weight is None else (dot * (one.var + eps).rsqrt()).to(one.weight.dtype)
    dbias = None if one.bias is None else total.to(one.bias.dtype)
    found = _Arguments(scaled, one.high, one.low, dweight, dbias, dy if has_residual else None, *[None] * 8)
    return list(found)


def _cut(dy: Tensor, y: Tensor) -> Tensor:
    """Dy where the ReLU let pass, else 0."""
    return torch.ops.aten.threshold_backward(dy, y, 0)


def _rows(flat: Sequence[Any], width: int) -> Any:
    return zip(*[iter(flat)] * width, strict=True)
