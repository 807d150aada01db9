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
from syncbn.models.blocks import ConvNorm, PoolBranch, SeparableConv2d, start_norm_activation
from syncbn.models.network import InceptionBN, InceptionModule, Stem

# Renamed in torch 2.13.
ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"

PeerExchange = Literal["all_gather", "two_reduces"]
Arithmetic = Literal["plain", "passes"]


class Plain:
    """Ordinary torch operators. y = x * a + b is the shortest way to write it, and two passes."""

    fuses_relu = False

    @staticmethod
    def mean_and_var(x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and biased variance (C)."""
        var, mean = torch.var_mean(x, _all_but_channels(x), correction=0)
        return mean, var

    @staticmethod
    def mean_and_square(x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and mean of squares (C)."""
        dims = _all_but_channels(x)
        return x.mean(dims), x.square().mean(dims)

    @staticmethod
    def normalize(x: Tensor, affine: ops.Affine) -> Tensor:
        """(x - mean) / sqrt(var + eps) * weight + bias."""
        mean, scale = affine.mean.to(x.dtype), _scale(affine).to(x.dtype)
        assert affine.bias is not None
        return x * _as(scale, x) + _as(affine.bias - mean * scale, x)

    @staticmethod
    def gradient_sums(dy: Tensor, x: Tensor, affine: ops.Affine) -> Tensor:
        """Sum dy and sum dy * (x - mean), one after the other (2C)."""
        dims, mean = _all_but_channels(x), affine.mean.to(x.dtype)
        return torch.cat([dy.sum(dims), (dy * (x - _as(mean, x))).sum(dims)])

    @staticmethod
    def input_gradient(dy: Tensor, x: Tensor, affine: ops.Affine, sums: Tensor, M: float) -> Tensor:
        """Scale * dy + slope * (x - mean) + offset."""
        total, dot = sums.chunk(2)
        scale = _scale(affine)
        slope, offset = dot / (affine.var + affine.eps) * scale / -M, total * scale / -M
        scale, slope, offset = (v.to(x.dtype) for v in (scale, slope, offset - slope * affine.mean))
        return dy * _as(scale, x) + x * _as(slope, x) + _as(offset, x)


class Passes:
    """The passes of `syncbn.ops`."""

    fuses_relu = True

    @staticmethod
    def mean_and_var(x: Tensor) -> tuple[Tensor, Tensor]:
        """As `Plain.mean_and_var`."""
        return ops.moments(x)

    @staticmethod
    def mean_and_square(x: Tensor) -> tuple[Tensor, Tensor]:
        """As `Plain.mean_and_square`."""
        total, dot = (ops.input_sums(x) / (x.numel() // x.shape[1])).chunk(2)
        return total, dot

    normalize = staticmethod(ops.normalize)

    @staticmethod
    def gradient_sums(dy: Tensor, x: Tensor, affine: ops.Affine) -> Tensor:
        """As `Plain.gradient_sums`."""
        return ops.gradient(dy, x, affine).sums

    input_gradient = staticmethod(ops.input_gradient)


def _scale(affine: ops.Affine) -> Tensor:
    assert affine.weight is not None
    return (affine.var + affine.eps).rsqrt() * affine.weight


def _all_but_channels(x: Tensor) -> list[int]:
    return [d for d in range(x.dim()) if d != 1]


def _as(v: Tensor, x: Tensor) -> Tensor:
    return ops.per_channel(v, x)


class Merged(NamedTuple):
    """Over all ranks: mean and biased variance (C), and M."""

    mean: Tensor
    var: Tensor
    M: float


def gather_statistics(arithmetic: Any, x: Tensor) -> Merged:
    """One all-gather of [mean (C), variance (C), count (1)], merged exactly."""
    C, dtype = x.shape[1], ops.compute_dtype(x.dtype)
    count = x.new_tensor([x.numel() // C], dtype=dtype)
    message = torch.cat([*(v.to(dtype) for v in arithmetic.mean_and_var(x)), count])
    gathered = message.new_empty(dist.get_world_size() * message.numel())
    getattr(dist, ALL_GATHER)(gathered, message)
    means, variances, counts = gathered.view(-1, 2 * C + 1).split([C, C, 1], dim=1)
    M = counts.sum()
    mean = (means * counts).sum(0) / M
    var = ((variances + (means - mean).square()) * counts).sum(0) / M
    return Merged(mean, var, M.item())


def reduce_statistics_twice(arithmetic: Any, x: Tensor) -> Merged:
    """An all-reduce of [sum x (C), count (1)], then one of [sum x^2 (C)]."""
    mean, square = arithmetic.mean_and_square(x)
    n = x.numel() // x.shape[1]
    first = torch.cat([mean * n, mean.new_tensor([n])])
    dist.all_reduce(first)
    second = square * n
    dist.all_reduce(second)
    M = first[-1].item()
    mean = first[:-1] / M
    return Merged(mean, (second / M - mean.square()).clamp_(min=0), M)


def reduce_gradient_once(sums: Tensor) -> Tensor:
    """One all-reduce of both sums."""
    totals = sums.clone()
    dist.all_reduce(totals)
    return totals


def reduce_gradient_twice(sums: Tensor) -> Tensor:
    """An all-reduce of each sum."""
    totals = sums.clone()
    for total in totals.chunk(2):
        dist.all_reduce(total)
    return totals


ARITHMETIC: dict[Arithmetic, Any] = {"plain": Plain, "passes": Passes}
EXCHANGE: dict[PeerExchange, tuple[Callable[[Any, Tensor], Merged], Callable[[Tensor], Tensor]]] = {
    "all_gather": (gather_statistics, reduce_gradient_once),
    "two_reduces": (reduce_statistics_twice, reduce_gradient_twice),
}


class _PeerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: "PeerBatchNorm", relu: bool, x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        x = ops.dense(x)
        mean, var, M = layer.merge(layer.arithmetic, x)
        ctx.layer, ctx.relu, ctx.M = layer, relu, M
        mean, var = mean.double(), var.double()
        ctx.save_for_backward(x, weight, bias, mean, var)
        y = layer.arithmetic.normalize(x, ops.Affine(mean, var, layer.eps, weight, bias, relu))
        unbiased = var * (M / (M - 1))
        ctx.mark_non_differentiable(mean, unbiased)
        return y, mean, unbiased

    @staticmethod
    def backward(ctx: Any, dy: Tensor, *_: Any) -> Any:
        x, weight, bias, mean, var = ctx.saved_tensors
        layer, arithmetic = ctx.layer, ctx.layer.arithmetic
        if dy.stride() != x.stride():
            dy = torch.empty_like(x).copy_(dy)
        affine = ops.Affine(mean, var, layer.eps, weight, bias, ctx.relu)
        if ctx.relu:
            dy, affine = ops.before_relu(dy, x, affine)
        sums = arithmetic.gradient_sums(dy, x, affine)
        dx = arithmetic.input_gradient(dy, x, affine, layer.merge_gradient(sums), ctx.M)
        total, dot = sums.chunk(2)
        dweight = dot * (var + layer.eps).rsqrt()
        return None, None, dx, dweight.to(weight.dtype), total.to(bias.dtype)


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
        exchange: PeerExchange,
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


class PartByPart(SeparableConv2d):
    """A separable convolution as stock code runs it: its two convolutions, one after another."""

    def forward(self, input: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, out_channels, H/stride, W/stride)."""
        return self.pointwise(self.depthwise(input))


def stock_inception(
    network: InceptionBN,
    make_norm: Callable[[_BatchNorm], nn.Module] | None = None,
    fused_convolutions: bool = False,
) -> InceptionBN:
    """A copy of the network with the same parameters, run layer by layer: 69 convolutions, 69 norms, torch's pools.

    Args:
        network: built by `syncbn.models.inception_bn`.
        make_norm: from a SyncBatchNorm, the layer to put in its place; None keeps it, with a message of its own.
        fused_convolutions: run 1x1 convolutions on the same input as one; their output is cut into the layers' inputs.
    """
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, InceptionModule) and not fused_convolutions:
            module.__class__ = BranchByBranch
        if isinstance(module, SeparableConv2d):
            module.__class__ = PartByPart
        if isinstance(module, Stem | PoolBranch):
            module.max_pool = F.max_pool2d
        if isinstance(module, ConvNorm) and make_norm is not None:
            bn = cast(_BatchNorm, module.bn)
            module.bn = make_norm(bn).to(bn.weight.dtype)
            module.bn.load_state_dict(bn.state_dict())
    return network
