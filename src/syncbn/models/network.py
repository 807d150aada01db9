"""Inception-BN, the network: its options, one module, the stem, and all of it.

Letters: N batch, C channels, H W space.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from syncbn.models.blocks import (
    ConvNorm,
    DoubleBranch,
    GlobalAveragePool,
    MaxPool,
    PoolBranch,
    ReducedBranch,
    UnitSpec,
    init_convolutions,
    max_pool_halving,
    scripted_max_pool_halving,
    sibling_conv,
    start_norm_activation,
)
from syncbn.models.table import DEPTH_MULTIPLIER, STEM_CONV1, STEM_CONV2, STEM_REDUCE, TABLE, ModuleRow, scale_channels
from syncbn.models.variants import ACTIVATIONS, VariantSpec, require, require_choice, resolve_variant
from syncbn.ops.max_pool import max_pool2d
from syncbn.recomputing import joined, recompute_activations

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


STEMS = ("imagenet", "small")


# The network's total stride, so that module 5b still has a position of its own.
MINIMUM_SIZE = {"imagenet": 32, "small": 8}


@dataclass(frozen=True)
class InceptionBNConfig:
    """What makes one Inception-BN differ from another.

    Its fields are the arguments of :func:`inception_bn`, which explains them, but for the weights.

    Raises:
        ValueError: for a value outside these, naming it and what is accepted.
    """

    num_classes: int = 1000
    variant: str = "paper"
    norm: str = "batch"
    activation: str = "relu"
    width_multiplier: float = 1.0
    stem: str = "imagenet"
    local_response_norm: bool = False
    dropout: float = 0.0
    per_activation_head: int | tuple[int, int] | None = None
    init_scale: float = 1.0
    in_channels: int = 3
    process_group: ProcessGroup | None = None
    separable_stem: bool | None = None
    stem_norm: bool | None = None
    projection_4cd: int | None = None
    conv_bias: bool | None = None
    gamma: bool | None = None
    padding: str | None = None
    eps: float | None = None
    momentum: float | None = None

    def __post_init__(self) -> None:
        """Check every value."""
        self.resolved_variant()
        require_choice("activation", self.activation, ACTIVATIONS)
        require_choice("stem", self.stem, STEMS)
        require(self.num_classes >= 1, "num_classes", self.num_classes, "at least 1")
        require(self.in_channels >= 1, "in_channels", self.in_channels, "at least 1")
        require(0 < self.width_multiplier < math.inf, "width_multiplier", self.width_multiplier, "positive")
        require(0 < self.init_scale < math.inf, "init_scale", self.init_scale, "positive")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "in [0, 1)")
        if self.norm == "none":
            for name in ("per_activation_head", "process_group"):
                require(getattr(self, name) is None, name, getattr(self, name), "None with norm='none'")
        if self.head_image_size is not None:
            least = MINIMUM_SIZE[self.stem]
            fits = min(self.head_image_size) >= least
            require(fits, "per_activation_head", self.per_activation_head, f"at least {least} pixels")

    @property
    def head_image_size(self) -> tuple[int, int] | None:
        """`per_activation_head` as (H, W) in pixels."""
        size = self.per_activation_head
        return (size, size) if isinstance(size, int) else size

    def resolved_variant(self) -> VariantSpec:
        """The variant with those of its attributes replaced that are given here."""
        given = {field.name: getattr(self, field.name) for field in fields(VariantSpec)}
        return resolve_variant(self.variant, self.norm, **given)


def changed_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `InceptionBNConfig`, besides the number of classes, that are not the default."""
    defaults = {field.name: field.default for field in fields(InceptionBNConfig) if field.name != "num_classes"}
    return {name: options[name] for name, default in defaults.items() if options[name] != default}


class InceptionModule(nn.Module):
    """One module: (N, C, H, W) -> (N, out_channels, H/stride, W/stride), in three messages.

    | message | normalises | computed while it travels |
    |---|---|---|
    | 1 | all 1x1 convolutions on the input, run as one | pool and projection |
    | 2 | first of the double 3x3, projection | the 3x3 |
    | 3 | second of the double 3x3, the 3x3 | |

    Parameters are stored per branch; branches that the table does not have are None.
    """

    def __init__(
        self, in_channels: int, row: ModuleRow, spec: UnitSpec, activation_size: tuple[int, int] | None = None
    ) -> None:
        super().__init__()

        def unit(source: int, channels: int, kernel: int, stride: int = 1) -> ConvNorm:
            return ConvNorm(source, channels, kernel, stride, spec=spec, activation_size=activation_size)

        self.branch_1x1 = None if row.conv_1x1 is None else unit(in_channels, row.conv_1x1, 1)
        self.branch_3x3 = ReducedBranch(
            unit(in_channels, row.reduce_3x3, 1), unit(row.reduce_3x3, row.conv_3x3, 3, row.stride)
        )
        self.branch_double_3x3 = DoubleBranch(
            unit(in_channels, row.reduce_double_3x3, 1),
            unit(row.reduce_double_3x3, row.double_3x3, 3),
            unit(row.double_3x3, row.double_3x3, 3, row.stride),
        )
        projection = None if row.projection is None else unit(in_channels, row.projection, 1)
        self.branch_pool = PoolBranch(row.pool, row.stride, projection, spec.padding)
        self.out_channels = row.out_channels(in_channels)

    def forward(self, input: Tensor) -> Tensor:
        """Run the branches side by side and concatenate them: 1x1, 3x3, double 3x3, pool."""
        if torch.jit.is_scripting():  # which compiles one unit after the other
            double = self.branch_double_3x3
            parts = [
                self.branch_3x3.spatial(self.branch_3x3.reduce(input)),
                double.spatial_2(double.spatial_1(double.reduce(input))),
                self.branch_pool(input),
            ]
            if self.branch_1x1 is not None:
                parts.insert(0, self.branch_1x1(input))
            return torch.cat(parts, dim=1)
        else:
            return self._in_three_messages(input)

    def _in_three_messages(self, input: Tensor) -> Tensor:
        single, double, projection = self.branch_3x3, self.branch_double_3x3, self.branch_pool.projection
        siblings = [single.reduce, double.reduce]
        if self.branch_1x1 is not None:
            siblings.insert(0, self.branch_1x1)

        first = start_norm_activation([siblings], [sibling_conv(siblings, input)])
        pooled = self.branch_pool(input)
        parts = first.finish()

        units, inputs = [[double.spatial_1]], [double.spatial_1.conv(parts.pop())]
        if projection is not None:
            units.append([projection])
            inputs.append(pooled)
        second = start_norm_activation(units, inputs)
        y_3x3 = single.spatial.conv(parts.pop())
        y_double, *projected = second.finish()

        third = start_norm_activation([[double.spatial_2], [single.spatial]], [double.spatial_2.conv(y_double), y_3x3])
        y_double, y_3x3 = third.finish()
        return joined([*parts, y_3x3, y_double, *(projected or [pooled])])


class Stem(nn.Module):
    """What comes before 3a: (N, in_channels, H, W) -> (N, 192, H/8, W/8), or H/2, W/2 for small images.

    "imagenet" is the paper's: 7x7 convolution of stride 2, max pool, 1x1 and 3x3 convolution, max pool.
    "small", for images of 28 to 64 pixels, has a 3x3 first convolution of stride 1 and only the first of the
    two pools: the modules see an image of 28 pixels with 14, 7 and 4 pixels, one of 224 with 28, 14 and 7.

    Attributes:
        max_pool: computes the max pools; F.max_pool2d can take its place.
    """

    max_pool: MaxPool = staticmethod(max_pool2d)

    def __init__(
        self, in_channels: int, width: float, kind: str, variant: VariantSpec, spec: UnitSpec, lrn: bool
    ) -> None:
        super().__init__()
        conv1, reduce, conv2 = (scale_channels(c, width) for c in (STEM_CONV1, STEM_REDUCE, STEM_CONV2))
        self.second_pool = kind == "imagenet"
        self.odd_padding = variant.padding == "same"
        self.conv1 = ConvNorm(
            in_channels,
            conv1,
            *((7, 2) if kind == "imagenet" else (3, 1)),
            spec=spec if variant.stem_norm else dataclasses.replace(spec, norm="none"),
            depth_multiplier=DEPTH_MULTIPLIER if variant.separable_stem else None,
        )
        self.conv2_reduce = ConvNorm(conv1, reduce, 1, spec=spec)
        self.conv2 = ConvNorm(reduce, conv2, 3, spec=spec)
        # GoogLeNet's, with the numbers of Caffe's; None is left out of the state_dict and of print(model).
        self.lrn1 = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75) if lrn else None
        self.lrn2 = nn.LocalResponseNorm(5, alpha=1e-4, beta=0.75) if lrn else None
        self.out_channels = conv2

    def forward(self, input: Tensor) -> Tensor:
        """Run the stem: three messages."""
        x = self._halved(self.conv1(input))
        x = x if self.lrn1 is None else self.lrn1(x)
        x = self.conv2(self.conv2_reduce(x))
        x = x if self.lrn2 is None else self.lrn2(x)
        return self._halved(x) if self.second_pool else x

    def _halved(self, input: Tensor) -> Tensor:
        if torch.jit.is_scripting():
            return scripted_max_pool_halving(input, self.odd_padding)
        else:
            return max_pool_halving(input, self.odd_padding, self.max_pool)


class InceptionBN(nn.Module):
    """Inception-BN: images (N, in_channels, H, W) -> logits (N, num_classes); :func:`inception_bn` builds it.

    In order: ``stem``, ``inception_3a`` to ``inception_5b``, ``pool`` (mean over H and W), ``dropout``, ``classifier``.
    Training synchronises 33 times forward and 33 times backward: 3 in the stem and 3 in each module.

    Attributes:
        recompute_activations: whether a training step keeps only the inputs of BatchNorm, and the backward makes their
            outputs again: see :func:`syncbn.recompute_activations`. Off unless set.
    """

    recompute_activations = False

    def __init__(self, config: InceptionBNConfig) -> None:
        super().__init__()
        variant = config.resolved_variant()
        spec = UnitSpec(
            config.norm,
            config.activation,
            variant.conv_bias,
            variant.gamma,
            variant.padding,
            variant.eps,
            variant.momentum,
            config.process_group,
        )
        # Those of inception_bn that make this network, but for the layers' process group and the initial weights.
        self.arguments = changed_options(vars(config) | {"process_group": None, "init_scale": 1.0})
        self.variant = variant
        self.in_channels = config.in_channels
        self.minimum_size = MINIMUM_SIZE[config.stem]
        self.head_image_size = config.head_image_size
        self.stem = Stem(
            config.in_channels, config.width_multiplier, config.stem, variant, spec, config.local_response_norm
        )
        self.module_names = tuple(f"inception_{row.name}" for row in TABLE)
        channels = self.stem.out_channels
        for row in TABLE:
            head = self.head_image_size if row.name == "5b" else None
            size = None if head is None else final_size(head, config.stem, variant.padding)
            module = InceptionModule(channels, _resolve(row, variant, config.width_multiplier), spec, size)
            self.add_module(f"inception_{row.name}", module)
            channels = module.out_channels
        self.pool: nn.Module = GlobalAveragePool()
        self.dropout = nn.Dropout(config.dropout)
        self.classifier: Any = nn.Linear(channels, config.num_classes)
        init_convolutions(self, config.init_scale)
        # Small, so that training starts from nearly equal class probabilities.
        nn.init.normal_(self.classifier.weight, std=0.01)
        nn.init.zeros_(self.classifier.bias)

    def forward_features(self, input: Tensor) -> Tensor:
        """Everything before the global average pool: (N, in_channels, H, W) -> (N, C, *final_size).

        Raises:
            ValueError: for another shape than the network's, or an image that is too small.
        """
        self._check_input(input)
        with recompute_activations(self.recompute_activations):
            x = self.stem(input)
            for name in self.module_names:
                x = getattr(self, name)(x)
        return x

    def forward(self, input: Tensor) -> Tensor:
        """Logits (N, num_classes) of images (N, in_channels, H, W); raises as ``forward_features`` does."""
        if torch.jit.is_scripting():
            for part in self.children():  # in their order
                input = part(input)
            return input
        else:
            return self.classifier(self.dropout(self.pool(self.forward_features(input))))

    def fold_batch_norm(self) -> InceptionBN:
        """A copy for inference, in eval mode, each BN folded into the convolution before it (Algorithm 2)."""
        network = copy.deepcopy(self).eval()
        for unit in network.modules():
            if isinstance(unit, ConvNorm):
                unit.fold()
        return network

    def _check_input(self, input: Tensor) -> None:
        shape = tuple(input.shape)
        if len(shape) != 4 or shape[1] != self.in_channels:
            raise ValueError(f"expected images of shape (N, {self.in_channels}, H, W), got {shape}")
        if min(shape[2:]) < self.minimum_size:
            least = self.minimum_size
            raise ValueError(f"images of {shape[2]}x{shape[3]} are too small: this network takes {least}x{least} up")
        if self.head_image_size not in (None, shape[2:]):
            raise ValueError(
                f"per_activation_head: built for images of {self.head_image_size}, got (H, W) = {shape[2:]}"
            )


def final_size(image_size: tuple[int, int], stem: str, padding: str) -> tuple[int, int]:
    """(H, W) of module 5b's output for images of (H, W), in pixels."""

    def side(size: int) -> int:
        size = size if stem == "small" else -(-size // 2)  # conv1
        for _ in range(1 if stem == "small" else 2):
            size = -(-size // 2) if padding == "same" else size // 2  # the stem's pools
        return -(-size // 4)  # 3c and 4e

    return side(image_size[0]), side(image_size[1])


def _resolve(row: ModuleRow, variant: VariantSpec, width_multiplier: float) -> ModuleRow:
    """The row as this network has it: the variant's projection, then all channels scaled."""
    if row.name in ("4c", "4d"):
        row = dataclasses.replace(row, projection=variant.projection_4cd)
    columns = ("conv_1x1", "reduce_3x3", "conv_3x3", "reduce_double_3x3", "double_3x3", "projection")
    scaled: dict[str, Any] = {
        c: scale_channels(getattr(row, c), width_multiplier) for c in columns if getattr(row, c) is not None
    }
    return dataclasses.replace(row, **scaled)
