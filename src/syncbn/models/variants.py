"""What public implementations of Inception-BN's table differ in, and the checks on these choices."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

NORMS = ("batch", "none")
ACTIVATIONS = ("relu", "sigmoid")
PADDINGS = ("symmetric", "same")


@dataclass(frozen=True)
class VariantSpec:
    """One public layout of the table.

    Attributes:
        separable_stem: first convolution depthwise (depth multiplier 8) then pointwise, or one dense one.
        stem_norm: whether the first convolution is normalised. If not, it has a bias.
        projection_4cd: channels of the pool projections of 4c and 4d, which the paper leaves open: 128 or 96.
        conv_bias: whether convolutions before a norm have a bias, which the norm then cancels.
        gamma: whether BN learns a scale. If not, ``bn.weight`` stays frozen at 1.
        padding: "symmetric": k // 2 on both sides, max pools of stride 2 as Caffe has them (no padding,
            rounding up), average pools count the padding. "same": TensorFlow's SAME, average pools do not
            count the padding.
        eps: BN's epsilon.
        momentum: weight of the newest statistics in BN's running ones (1 - decay).
    """

    separable_stem: bool
    stem_norm: bool
    projection_4cd: int
    conv_bias: bool
    gamma: bool
    padding: str
    eps: float
    momentum: float


# The paper does not state padding, eps and decay: its variant takes Caffe's padding and PyTorch's numbers.
VARIANTS = {
    "paper": VariantSpec(True, True, 128, False, True, "symmetric", 1e-5, 0.1),
    "cadene": VariantSpec(False, True, 128, True, True, "symmetric", 1e-5, 0.1),
    "slim": VariantSpec(True, False, 96, False, False, "same", 1e-3, 1 - 0.9997),
}
_OF_NORM = ("stem_norm", "conv_bias", "gamma", "eps", "momentum")


def require(accepted: bool, name: str, value: object, what: str) -> None:
    """Raise a ValueError that names the argument, its value and what is accepted, unless it is."""
    if not accepted:
        raise ValueError(f"{name} must be {what}, got {value!r}")


def require_choice(name: str, value: object, accepted: Iterable[str]) -> None:
    """Raise a ValueError unless the value is one of those accepted."""
    accepted = tuple(accepted)
    require(value in accepted, name, value, " or ".join(f'"{choice}"' for choice in accepted))


def resolve_variant(variant: str, norm: str, **overrides: Any) -> VariantSpec:
    """Look a variant up and replace those of its attributes that are not None in ``overrides``.

    Raises:
        ValueError: for an unknown variant or norm, a value out of range, or an attribute of the norm given
            although there is no norm.
    """
    require_choice("variant", variant, VARIANTS)
    require_choice("norm", norm, NORMS)
    given = {name: value for name, value in overrides.items() if value is not None}
    if norm == "none":
        for name in _OF_NORM:
            require(name not in given, name, given.get(name), "None with norm='none'")
    spec = dataclasses.replace(VARIANTS[variant], **given)
    require_choice("padding", spec.padding, PADDINGS)
    require(spec.projection_4cd >= 1, "projection_4cd", spec.projection_4cd, "at least 1")
    require(spec.eps > 0, "eps", spec.eps, "positive")
    require(0 <= spec.momentum <= 1, "momentum", spec.momentum, "in [0, 1]")
    return spec
