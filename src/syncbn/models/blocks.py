"""Blocks of the models: a convolution with its normalisation, and how several of them share a message.

Letters: N batch, C channels, H W space.

From top to bottom: convolutions, the unit, how units run together, the branches of a module, initialisation.

A unit (:class:`ConvNorm`) only *stores* a convolution and its BatchNorm. The network decides how units run:
siblings on the same input as one convolution (:func:`sibling_conv`), independent units in one message
(:func:`start_norm_activation`). Forward hooks on a unit's ``conv`` or ``bn`` therefore need not fire; what
:mod:`syncbn.models.observation` attaches to them does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from syncbn.models.observation import is_observed, show
from syncbn.nn import BatchNorm, PerActivationBatchNorm, SyncBatchNorm, start_sync_batch_norm
from syncbn.nn.fold import fold_into
from syncbn.ops.max_pool import max_pool2d
from syncbn.recomputing import compact_indices

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MaxPool: TypeAlias = Callable[..., Tensor]  # with the arguments of F.max_pool2d

# The standard deviation of a standard normal truncated at two standard deviations.
_TRUNCATED_STD = 0.87962566103423978


@dataclass(frozen=True)
class UnitSpec:
    """What all units of a network have in common.

    Attributes:
        norm: "batch" or "none". Without a norm every convolution has a bias.
        activation: "relu" or "sigmoid", after the norm.
        conv_bias: a bias on convolutions that a norm follows too.
        gamma: whether the norm learns a scale. If not, ``bn.weight`` stays frozen at 1.
        padding: "symmetric" (k // 2 on both sides) or "same" (TensorFlow's SAME).
        eps: added to the variance.
        momentum: weight of the newest statistics in the running ones.
        process_group: the ranks that normalise together; None is all.
    """

    norm: str = "batch"
    activation: str = "relu"
    conv_bias: bool = False
    gamma: bool = True
    padding: str = "symmetric"
    eps: float = 1e-5
    momentum: float = 0.1
    process_group: ProcessGroup | None = None


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after one axis of ``size`` elements under TensorFlow's SAME: the odd one goes last."""
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


class Conv2dSame(nn.Conv2d):
    """A strided convolution with a square kernel and SAME padding: (N, C, H, W) -> ceil(H/stride)."""

    def forward(self, input: Tensor) -> Tensor:
        """Pad by the input's size, then convolve."""
        return self._conv_forward(self.pad(input), self.weight, self.bias)

    def pad(self, input: Tensor) -> Tensor:
        """What is convolved: the input with its zeros."""
        top, bottom = same_padding(input.shape[-2], self.kernel_size[0], self.stride[0])
        left, right = same_padding(input.shape[-1], self.kernel_size[0], self.stride[0])
        return F.pad(input, [left, right, top, bottom])


def make_conv(
    in_channels: int,
    out_channels: int,
    kernel: int,
    stride: int,
    *,
    padding: str,
    bias: bool,
    groups: int = 1,
) -> nn.Conv2d:
    """Build a convolution with an odd square kernel; at stride 1 both kinds of padding are the same."""
    if padding == "same" and stride > 1:
        return Conv2dSame(in_channels, out_channels, kernel, stride, bias=bias, groups=groups)
    return nn.Conv2d(in_channels, out_channels, kernel, stride, kernel // 2, bias=bias, groups=groups)


class SeparableConv2d(nn.Module):
    """A depthwise, then a pointwise convolution: (N, C, H, W) -> (N, out_channels, H/stride, W/stride).

    With nothing between them both are one dense convolution, whose weights are the product of theirs. Training on a GPU
    runs that one: depthwise convolutions are slow there, above all backward, and nothing between the two is to be kept.
    Elsewhere they run one after the other, and so round as the published networks do.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int,
        *,
        depth_multiplier: int,
        padding: str,
        bias: bool,
    ) -> None:
        super().__init__()
        depth = in_channels * depth_multiplier
        self.depthwise = make_conv(in_channels, depth, kernel, stride, padding=padding, bias=False, groups=in_channels)
        self.pointwise = make_conv(depth, out_channels, 1, 1, padding=padding, bias=bias)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve."""
        if torch.jit.is_scripting():
            return self.pointwise(self.depthwise(input))
        else:  # which TorchScript does not read
            as_one = self.depthwise.weight.is_cuda and self.may_run_as_one()
            return self.as_one(input) if as_one else self.pointwise(self.depthwise(input))

    def may_run_as_one(self) -> bool:
        """Whether it trains, and nobody looks at its parts, prunes or parametrises them."""
        parts = (self.depthwise, self.pointwise)
        plain = all(type(conv) in (nn.Conv2d, Conv2dSame) for conv in parts)
        return self.training and plain and not any(conv._forward_hooks or conv._forward_pre_hooks for conv in parts)

    def as_one(self, input: Tensor) -> Tensor:
        """Convolve once."""
        first = self.depthwise
        input = first.pad(input) if isinstance(first, Conv2dSame) else input
        return F.conv2d(input, self.dense_weight(), self.pointwise.bias, first.stride, first.padding)

    def dense_weight(self) -> Tensor:
        """The weights (out_channels, C, kernel, kernel) of both as one."""
        by_input = (
            self.depthwise.groups,
            -1,
        )  # channel c of the input has the multiplier's channels c * m to c * m + m
        deep = self.depthwise.weight.squeeze(1).unflatten(0, by_input)
        wide = self.pointwise.weight.flatten(1).unflatten(1, by_input)
        with torch.autocast(deep.device.type, enabled=False):  # in float32, to be rounded by the convolution
            return torch.einsum("ocm,cmhw->ochw", wide, deep)


class ConvNorm(nn.Module):
    """Convolution, BatchNorm or none, activation: (N, C, H, W) -> (N, out_channels, H/stride, W/stride).

    As built, ``bn`` is a SyncBatchNorm that fuses the ReLU. The unit works as well with ``nn.BatchNorm2d`` in
    its place (a reverted network) or ``nn.Identity`` (a folded one, whose convolution gained a bias).

    Args:
        in_channels: C of the input.
        out_channels: C of the output.
        kernel: side of the square kernel, odd.
        stride: step of the kernel.
        spec: what the units of the network have in common.
        depth_multiplier: None for a dense convolution, otherwise that of a separable one.
        activation_size: (H, W) of the output if each activation is to be normalised by itself over the batch
            (per-activation BN, the paper's "non-convolutional" one) instead of each feature map.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int = 1,
        *,
        spec: UnitSpec,
        depth_multiplier: int | None = None,
        activation_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        bias = spec.conv_bias or spec.norm == "none"
        self.out_channels = out_channels
        self.activation = spec.activation
        self.conv: nn.Module
        if depth_multiplier is None:
            self.conv = make_conv(in_channels, out_channels, kernel, stride, padding=spec.padding, bias=bias)
        else:
            self.conv = SeparableConv2d(
                in_channels,
                out_channels,
                kernel,
                stride,
                depth_multiplier=depth_multiplier,
                padding=spec.padding,
                bias=bias,
            )
        self.bn = _make_norm(out_channels, spec, activation_size)

    __jit_unused_properties__ = ("last_conv", "shares_messages")

    @property
    def last_conv(self) -> nn.Conv2d:
        """The convolution right before the norm: the one whose weights can absorb it."""
        return self.conv.pointwise if isinstance(self.conv, SeparableConv2d) else cast(nn.Conv2d, self.conv)

    @property
    def shares_messages(self) -> bool:
        """Whether the norm is one of this package's, several of which can run in one message."""
        return isinstance(self.bn, BatchNorm)

    def fold(self) -> None:
        """Fold the norm into the convolution, in place: Algorithm 2's affine map, for inference.

        A per-activation norm stays: its map differs from position to position, a convolution's does not.
        """
        if not isinstance(self.bn, BatchNorm) or isinstance(self.bn, PerActivationBatchNorm):
            return
        folded = fold_into(self.last_conv, self.bn)
        if isinstance(self.conv, SeparableConv2d):
            self.conv.pointwise = cast(nn.Conv2d, folded)
        else:
            self.conv = folded
        self.bn = nn.Identity()

    def activate(self, y: Tensor) -> Tensor:
        """Apply the activation, unless the norm has."""
        if self.activation == "sigmoid":
            return torch.sigmoid(y)
        return y if getattr(self.bn, "activation", None) == "relu" else F.relu(y)

    def forward(self, input: Tensor) -> Tensor:
        """Run the unit by itself: one message."""
        if torch.jit.is_scripting():
            y = self.bn(self.conv(input))
            return torch.sigmoid(y) if self.activation == "sigmoid" else F.relu(y)
        else:  # which TorchScript does not read
            return start_norm_activation([[self]], [self.conv(input)]).finish()[0]


def _make_norm(channels: int, spec: UnitSpec, activation_size: tuple[int, int] | None) -> nn.Module:
    if spec.norm == "none":
        return nn.Identity()
    fused = "relu" if spec.activation == "relu" else None
    bn: nn.Module
    if activation_size is None:
        bn = SyncBatchNorm(channels, spec.eps, spec.momentum, process_group=spec.process_group, activation=fused)
    else:
        shape = (channels, *activation_size)
        bn = PerActivationBatchNorm(shape, spec.eps, spec.momentum, process_group=spec.process_group, activation=fused)
    if not spec.gamma:
        cast(Tensor, bn.weight).requires_grad_(False)
    return bn


class PendingActivations:
    """Normalisations under way, from :func:`start_norm_activation`."""

    def __init__(self, units: Sequence[Sequence[ConvNorm]], inputs: Sequence[Tensor]) -> None:
        self._units = units
        self._inputs = inputs
        self._message = None
        self._flat = False
        if all(unit.shares_messages for siblings in units for unit in siblings):
            norms = [[cast(BatchNorm, unit.bn) for unit in siblings] for siblings in units]
            # To a per-activation norm every activation is a channel: (N, C*H*W), siblings still side by side.
            self._flat = isinstance(norms[0][0], PerActivationBatchNorm)
            flattened = [z.flatten(1) if self._flat else z for z in inputs]
            self._message = start_sync_batch_norm(norms, flattened, split=True)

    def finish(self) -> list[Tensor]:
        """Wait for the message, if there is one, and return the activations, one tensor per unit."""
        if self._message is None:
            return [y for pair in zip(self._units, self._inputs, strict=True) for y in _apply_one_by_one(*pair)]
        outputs = iter(self._message.finish())
        activations = []
        for siblings, z in zip(self._units, self._inputs, strict=True):
            ys = [next(outputs) for _ in siblings]
            if self._flat:
                ys = [y.unflatten(1, (-1, *z.shape[2:])) for y in ys]
            _show_norms(siblings, z, ys)
            activations += [unit.activate(y) for unit, y in zip(siblings, ys, strict=True)]
        return activations


def _apply_one_by_one(siblings: Sequence[ConvNorm], z: Tensor) -> list[Tensor]:
    parts = split_siblings(siblings, z)
    if all(isinstance(unit.bn, nn.Identity) for unit in siblings):
        _show_norms(siblings, z, parts)
        return [unit.activate(part) for unit, part in zip(siblings, parts, strict=True)]
    return [unit.activate(unit.bn(part)) for unit, part in zip(siblings, parts, strict=True)]


def _show_norms(siblings: Sequence[ConvNorm], z: Tensor, ys: Sequence[Tensor]) -> None:
    """Show the norms of siblings that ran as one; z (N, sum of their channels, H, W) went in, ys came out."""
    if any(is_observed(unit.bn) for unit in siblings):
        for unit, part, y in zip(siblings, split_siblings(siblings, z), ys, strict=True):
            show(unit.bn, part, y)


def start_norm_activation(units: Sequence[Sequence[ConvNorm]], inputs: Sequence[Tensor]) -> PendingActivations:
    """Begin to normalise the outputs of several convolutions, all in one message.

    What is computed between this call and ``finish()`` runs while the message travels; so does its backward,
    because autograd runs later operations first.

    Args:
        units: for each input the units whose channels lie side by side in it.
        inputs: outputs of the units' convolutions, each (N, sum of the siblings' channels, H, W).

    Returns:
        A handle whose ``finish()`` returns the activations, one tensor per unit.
    """
    return PendingActivations(units, inputs)


def sibling_conv(units: Sequence[ConvNorm], input: Tensor) -> Tensor:
    """Run 1x1 convolutions on the same input as one: (N, C, H, W) -> (N, sum of their channels, H, W)."""
    convs = [unit.last_conv for unit in units]
    weight = torch.cat([conv.weight for conv in convs])
    biases = [conv.bias for conv in convs if conv.bias is not None]
    output = F.conv2d(input, weight, torch.cat(biases) if biases else None)
    if any(map(is_observed, convs)):
        for conv, part in zip(convs, split_siblings(units, output), strict=True):
            show(conv, input, part)
    return output


def split_siblings(units: Sequence[ConvNorm], tensor: Tensor) -> tuple[Tensor, ...]:
    """What belongs to each of several units whose channels lie side by side."""
    return tensor.split([unit.out_channels for unit in units], dim=1)


def max_pool_halving(input: Tensor, odd_padding: bool, max_pool: MaxPool = max_pool2d) -> Tensor:
    """3x3 max pool of stride 2: (N, C, H, W) -> (N, C, ceil(H/2), ceil(W/2)).

    On even sizes Caffe's pool and TensorFlow's SAME agree: no padding, the last window cut short. On odd ones
    SAME pads by 1 (``odd_padding``); Caffe does not, and returns floor(H/2).
    """
    height, width = input.shape[-2:]
    padding = (height % 2, width % 2) if odd_padding else (0, 0)
    with compact_indices((height, width)):
        return max_pool(input, 3, 2, padding, ceil_mode=True)


def scripted_max_pool_halving(input: Tensor, odd_padding: bool) -> Tensor:
    """`max_pool_halving` in operators that TorchScript knows."""
    height, width = input.shape[-2], input.shape[-1]
    padding = [height % 2, width % 2] if odd_padding else [0, 0]
    return F.max_pool2d(input, [3, 3], [2, 2], padding, ceil_mode=True)


class GlobalAveragePool(nn.Module):
    """Average over the positions: (N, C, H, W) -> (N, C)."""

    def forward(self, input: Tensor) -> Tensor:
        """Pool."""
        return input.mean(dim=(2, 3))


class ReducedBranch(nn.Module):
    """The parameters of a 1x1 reduction and the 3x3 convolution on it; InceptionModule runs them."""

    def __init__(self, reduce: ConvNorm, spatial: ConvNorm) -> None:
        super().__init__()
        self.reduce = reduce
        self.spatial = spatial


class DoubleBranch(nn.Module):
    """The parameters of a 1x1 reduction and the two 3x3 convolutions on it; InceptionModule runs them."""

    def __init__(self, reduce: ConvNorm, spatial_1: ConvNorm, spatial_2: ConvNorm) -> None:
        super().__init__()
        self.reduce = reduce
        self.spatial_1 = spatial_1
        self.spatial_2 = spatial_2


class PoolBranch(nn.Module):
    """3x3 pool, then a 1x1 projection or nothing: (N, C, H, W) -> (N, C or projection, H/stride, W/stride).

    Args:
        kind: "avg" or "max".
        stride: 1, or 2 for the max pool without projection.
        projection: the unit after the pool, or None.
        padding: "symmetric" or "same": whether the average counts padded zeros.

    Attributes:
        max_pool: computes the max pool; F.max_pool2d can take its place.
    """

    max_pool: MaxPool = staticmethod(max_pool2d)

    def __init__(self, kind: str, stride: int, projection: ConvNorm | None, padding: str) -> None:
        super().__init__()
        self.kind = kind
        self.stride = stride
        self.projection = projection
        self.count_padding = padding == "symmetric"

    def forward(self, input: Tensor) -> Tensor:
        """Pool and project, before norm and activation; what torch.jit.script compiles ends with these."""
        if torch.jit.is_scripting():
            if self.stride == 2:
                return scripted_max_pool_halving(input, odd_padding=True)
            if self.kind == "max":
                pooled = F.max_pool2d(input, [3, 3], [1, 1], [1, 1])
            else:
                pooled = F.avg_pool2d(input, [3, 3], [1, 1], [1, 1], count_include_pad=self.count_padding)
            return pooled if self.projection is None else self.projection(pooled)
        else:
            return self._pooled(input)

    def _pooled(self, input: Tensor) -> Tensor:
        if self.stride == 2:
            # Its output lies beside those of the stride-2 convolutions, which return ceil(H/2).
            return max_pool_halving(input, odd_padding=True, max_pool=self.max_pool)
        if self.projection is None or self.kind == "max":
            with compact_indices(input.shape[-2:]):
                pooled = self.max_pool(input, 3, 1, 1)
            return pooled if self.projection is None else self.projection.conv(pooled)
        # Averaging commutes with a 1x1 convolution and is cheaper after it, on fewer channels. The bias comes
        # last: the average would shrink it where it counts padding.
        conv = self.projection.last_conv
        output = self._average(F.conv2d(input, conv.weight))
        output = output if conv.bias is None else output + conv.bias.view(-1, 1, 1)
        if is_observed(conv):
            show(conv, self._average(input.detach()), output)
        return output

    def _average(self, input: Tensor) -> Tensor:
        return F.avg_pool2d(input, 3, 1, 1, count_include_pad=self.count_padding)


def init_convolutions(network: nn.Module, scale: float = 1.0) -> None:
    """Draw all convolution weights anew: He's truncated normal by fan-in; biases 0.

    A normal truncated at two standard deviations, of variance ``scale^2 * gain / fan_in`` after truncation;
    gain 2 (He et al. 2015, for ReLU), but 1 for a depthwise convolution, which no activation follows. Under
    BN this scale does not change the outputs, only how fast the weights turn: it serves sigmoid as well.
    """
    depthwise = {module.depthwise for module in network.modules() if isinstance(module, SeparableConv2d)}
    for conv in network.modules():
        if isinstance(conv, nn.Conv2d):
            fan_in = conv.weight[0].numel()
            gain = 1.0 if conv in depthwise else 2.0
            std = scale * math.sqrt(gain / fan_in) / _TRUNCATED_STD
            nn.init.trunc_normal_(conv.weight, std=std, a=-2 * std, b=2 * std)
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)
