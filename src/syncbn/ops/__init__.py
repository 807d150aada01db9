"""What one rank computes on one activation: four passes over it, no collective and no module.

This is the one dispatch point: a faster implementation of the same signatures (a GPU kernel) is chosen here.
"""

from syncbn.ops.aten import (
    Shifted,
    Sums,
    about_origin,
    composed_sums,
    compute_dtype,
    dense,
    gradient_sums,
    input_gradient,
    input_sums,
    normalize,
    per_channel,
    pivot,
    shift,
    whole_gradient,
)

__all__ = [
    "Shifted",
    "Sums",
    "about_origin",
    "composed_sums",
    "compute_dtype",
    "dense",
    "gradient_sums",
    "input_gradient",
    "input_sums",
    "normalize",
    "per_channel",
    "pivot",
    "shift",
    "whole_gradient",
]
