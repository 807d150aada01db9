"""The synchronised BatchNorms that others use, written from their descriptions: what syncbn is measured against.

Two ways to exchange statistics over P ranks:
- "all_gather": every rank's mean, variance and count go to every rank, which merges them; backward one all-reduce of
  [sum dy, sum dy * (x - mean)]. As torch.nn.SyncBatchNorm and apex do.
- "two_reduces": the means are reduced first, the means of squares after them; backward the two sums one by one. As MMCV
  and Keras do.

Each with two kinds of local arithmetic, so that messages and passes can be told apart:
- "plain": ordinary torch operators, as anyone would write them on a CPU;
- "passes": those of `syncbn.ops`, the same as syncbn's, so that only the messages differ.

And Inception-BN as stock code runs it: branch by branch, one convolution and one norm at a time.
Letters: N batch, C channels, M elements per channel over all ranks, P ranks.
"""

import copy
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn import ops
from syncbn.models.blocks import ConvNorm, start_norm_activation
from syncbn.models.inception_bn import InceptionBN, InceptionModule

# Renamed in torch 2.13.
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"

Exchange = Literal["all_gather", "two_reduces"]
Arithmetic = Literal["plain", "passes"]


class Local(NamedTuple):
    """What a rank finds in its x: the mean (C), a second moment (C), and x as it was read."""

    mean: Tensor
    second: Tensor
    read: ops.Shifted


class Plain:
    """Ordinary torch operators. y = x * a + b is the shortest way to write it, and two passes."""

    fuses_relu = False

    @staticmethod
    def mean_and_var(x: Tensor) -> Local:
        """The second moment is the biased variance."""
        var, mean = torch.var_mean(x, _all_but_channels(x), correction=0)
        return Local(mean, var, ops.Shifted(x, None))

    @staticmethod
    def mean_and_square(x: Tensor) -> Local:
        """The second moment is the mean of squares."""
        dims = _all_but_channels(x)
        return Local(x.mean(dims), x.square().mean(dims), ops.Shifted(x, None))

    @staticmethod
    def normalize(read: ops.Shifted, mean: Tensor, var: Tensor, eps: float, weight: Tensor, bias: Tensor) -> Tensor:
        """(x - mean) / sqrt(var + eps) * weight + bias."""
        x, scale = read.values, weight * (var + eps).rsqrt()
        return x * _as(scale, x) + _as(bias - mean * scale, x)

    @staticmethod
    def gradient_sums(dy: Tensor, x: Tensor, pivot: Tensor | None, mean: Tensor) -> ops.Sums:
        """Sum dy and sum dy * (x - mean)."""
        dims = _all_but_channels(x)
        return ops.Sums(dy.sum(dims), (dy * (x - _as(mean, x))).sum(dims))

    @staticmethod
    def input_gradient(
        dy: Tensor, x: Tensor, pivot: Tensor | None, mean: Tensor, scale: Tensor, slope: Tensor, offset: Tensor
    ) -> Tensor:
        """Scale * dy + slope * (x - mean) + offset."""
        return dy * _as(scale, x) + x * _as(slope, x) + _as(offset - slope * mean, x)


class Passes:
    """The passes of `syncbn.ops`. `mean` is less the pivot where one was subtracted."""

    fuses_relu = True

    @staticmethod
    def mean_and_var(x: Tensor) -> Local:
        """The second moment is the biased variance."""
        mean, square, read = Passes.mean_and_square(x)
        return Local(mean, torch.addcmul(square, mean, mean, value=-1).clamp_(min=0), read)

    @staticmethod
    def mean_and_square(x: Tensor) -> Local:
        """The second moment is the mean of squares."""
        sums, read = ops.input_sums(x)
        n = x.numel() // x.shape[1]
        sums = ops.about_origin(sums, read.pivot, n)
        return Local(sums.total.double() / n, sums.dot.double() / n, read)

    @staticmethod
    def normalize(read: ops.Shifted, mean: Tensor, var: Tensor, eps: float, weight: Tensor, bias: Tensor) -> Tensor:
        """As `Plain.normalize`."""
        return ops.normalize(read, mean, var, eps, weight, bias, in_place=read.pivot is not None)

    gradient_sums = staticmethod(ops.gradient_sums)
    input_gradient = staticmethod(ops.input_gradient)


def _all_but_channels(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _as(v: Tensor, x: Tensor) -> Tensor:
    return ops.per_channel(v, x)


class Merged(NamedTuple):
    """Over all ranks: mean and biased variance (C), and M; this rank's x as it was read."""

    mean: Tensor
    var: Tensor
    M: float
    read: ops.Shifted


def gather_statistics(arithmetic: Any, x: Tensor) -> Merged:
    """One all-gather of [mean (C), variance (C), count (1)], merged exactly."""
    local = arithmetic.mean_and_var(x)
    C, dtype = x.shape[1], ops.compute_dtype(x.dtype)
    count = x.new_tensor([x.numel() // C], dtype=dtype)
    message = torch.cat([local.mean.to(dtype), local.second.to(dtype), count])
    gathered = message.new_empty(dist.get_world_size() * message.numel())
    getattr(dist, ALL_GATHER)(gathered, message)
    means, variances, counts = gathered.view(-1, 2 * C + 1).split([C, C, 1], dim=1)
    M = counts.sum()
    mean = (means * counts).sum(0) / M
    var = ((variances + (means - mean).square()) * counts).sum(0) / M
    return Merged(mean, var, M.item(), local.read)


def reduce_statistics_twice(arithmetic: Any, x: Tensor) -> Merged:
    """An all-reduce of [sum x (C), count (1)], then one of [sum x^2 (C)]."""
    local = arithmetic.mean_and_square(x)
    n = x.numel() // x.shape[1]
    first = torch.cat([local.mean * n, local.mean.new_tensor([n])])
    dist.all_reduce(first)
    second = local.second * n
    dist.all_reduce(second)
    M = first[-1].item()
    mean = first[:-1] / M
    return Merged(mean, (second / M - mean.square()).clamp_(min=0), M, local.read)


def reduce_gradient_once(sums: ops.Sums) -> ops.Sums:
    """One all-reduce of both sums."""
    message = torch.cat(list(sums))
    dist.all_reduce(message)
    return ops.Sums(*message.chunk(2))


def reduce_gradient_twice(sums: ops.Sums) -> ops.Sums:
    """An all-reduce of each sum."""
    totals = ops.Sums(sums.total.clone(), sums.dot.clone())
    for total in totals:
        dist.all_reduce(total)
    return totals


ARITHMETIC: dict[Arithmetic, Any] = {"plain": Plain, "passes": Passes}
EXCHANGE: dict[Exchange, tuple[Callable[[Any, Tensor], Merged], Callable[[ops.Sums], ops.Sums]]] = {
    "all_gather": (gather_statistics, reduce_gradient_once),
    "two_reduces": (reduce_statistics_twice, reduce_gradient_twice),
}


class _PeerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: "PeerBatchNorm", relu: bool, x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        mean, var, M, read = layer.merge(layer.arithmetic, ops.dense(x))
        dtype, pivot = read.values.dtype, read.pivot
        centre, biased = (mean if pivot is None else mean - pivot).to(dtype), var.to(dtype)
        y = layer.arithmetic.normalize(read, centre, biased, layer.eps, weight, bias)
        ctx.layer, ctx.relu, ctx.M = layer, relu, M
        ctx.save_for_backward(x, weight, bias, centre, biased, pivot)
        unbiased = var * (M / (M - 1))
        ctx.mark_non_differentiable(mean, unbiased)
        return (y.relu_() if relu else y), mean, unbiased

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> Any:
        x, weight, bias, centre, var, pivot = ctx.saved_tensors
        layer, x = ctx.layer, ops.dense(x)
        arithmetic = layer.arithmetic
        if dy.stride() != x.stride():
            dy = torch.empty_like(x).copy_(dy)
        if ctx.relu:  # the mask is computed again, as syncbn does
            y = arithmetic.normalize(ops.shift(x, pivot), centre, var, layer.eps, weight, bias)
            dy = torch.ops.aten.threshold_backward(dy, y, 0)
        sums = arithmetic.gradient_sums(dy, x, pivot, centre)
        total, dot = layer.merge_gradient(sums)
        invstd = (var + layer.eps).rsqrt()
        scale = invstd * weight
        slope = dot * invstd.square() * scale / -ctx.M
        dx = arithmetic.input_gradient(
            dy, x, pivot, centre, *(v.to(x.dtype) for v in (scale, slope)), (total * scale / -ctx.M).to(x.dtype)
        )
        return None, None, dx, (sums.dot * invstd).to(weight.dtype), sums.total.to(bias.dtype)


class PeerBatchNorm(_BatchNorm):
    """BatchNorm over the world's ranks by another algorithm; in training only.

    Args:
        num_features: C.
        eps: added to the variance.
        momentum: of the running statistics.
        exchange: "all_gather" or "two_reduces".
        arithmetic: "plain" or "passes".
        activation: None, or "relu" to apply it too: in place in "plain", in the same autograd node in "passes".
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        *,
        exchange: Exchange,
        arithmetic: Arithmetic,
        activation: str | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum)
        self.exchange, self.activation = exchange, activation
        self.arithmetic = ARITHMETIC[arithmetic]
        self.merge, self.merge_gradient = EXCHANGE[exchange]

    def forward(self, input: Tensor) -> Tensor:
        """Normalise input (N, C, ...)."""
        assert self.training, "a peer is there to be timed in training"
        relu = self.activation == "relu"
        fused = relu and self.arithmetic.fuses_relu
        y, mean, unbiased = _PeerNorm.apply(self, fused, input, self.weight, self.bias)
        assert self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None
        for running, new in ((self.running_mean, mean), (self.running_var, unbiased)):
            running.lerp_(new.to(running.dtype), cast(float, self.momentum))
        self.num_batches_tracked.add_(1)
        return F.relu_(y) if relu and not fused else y

    def _check_input_dim(self, input: Tensor) -> None:
        pass


class BranchByBranch(InceptionModule):
    """An Inception module as stock code runs it: each convolution and its norm by themselves, one after another."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, out_channels, H/stride, W/stride)."""
        single, double, pool = self.branch_3x3, self.branch_double_3x3, self.branch_pool
        parts = [] if self.branch_1x1 is None else [self.branch_1x1(input)]
        parts.append(single.spatial(single.reduce(input)))
        parts.append(double.spatial_2(double.spatial_1(double.reduce(input))))
        pooled = pool(input)
        if pool.projection is not None:
            (pooled,) = start_norm_activation([[pool.projection]], [pooled]).finish()
        return torch.cat([*parts, pooled], dim=1)


def stock_inception(
    network: InceptionBN,
    make_norm: Callable[[_BatchNorm], nn.Module] | None = None,
    fused_convolutions: bool = False,
) -> InceptionBN:
    """A copy of the network with the same parameters, run one layer at a time: 69 convolutions, 69 norms.

    Args:
        network: built by `syncbn.models.inception_bn`.
        make_norm: from a SyncBatchNorm, the layer to put in its place; None keeps it, with a message of its own.
        fused_convolutions: run 1x1 convolutions on the same input as one; their output is cut into the layers' inputs.
    """
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, InceptionModule) and not fused_convolutions:
            module.__class__ = BranchByBranch
        if isinstance(module, ConvNorm) and make_norm is not None:
            bn = cast(_BatchNorm, module.bn)
            module.bn = make_norm(bn).to(bn.weight.dtype)
            module.bn.load_state_dict(bn.state_dict())
    return network
