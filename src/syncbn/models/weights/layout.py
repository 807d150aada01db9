"""What a layout of weights is: a table of names, and how the axes of the tensors differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from syncbn.models.table import DEPTH_MULTIPLIER, TABLE

STEM_UNITS = ("stem.conv1", "stem.conv2_reduce", "stem.conv2")
"""Units of the stem by our names."""

NORM_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
"""What a BatchNorm holds."""


@dataclass(frozen=True)
class Axes:
    """How a tensor of a foreign layout becomes one of ours, and back.

    Attributes:
        to_ours: From the foreign order of the axes to ours.
        to_theirs: The inverse.
    """

    to_ours: Callable[[Tensor], Tensor]
    to_theirs: Callable[[Tensor], Tensor]


SAME = Axes(lambda t: t, lambda t: t)
CONVOLUTION = Axes(lambda t: t.permute(3, 2, 0, 1), lambda t: t.permute(2, 3, 1, 0))
"""TensorFlow's HWIO and PyTorch's OIHW."""

# Output channel i * DEPTH_MULTIPLIER + m is the m-th of input channel i in both.
DEPTHWISE = Axes(
    lambda t: t.permute(2, 3, 0, 1).flatten(0, 1).unsqueeze(1),
    lambda t: t.squeeze(1).unflatten(0, (-1, DEPTH_MULTIPLIER)).permute(2, 3, 0, 1),
)
"""TensorFlow's (H, W, C, multiplier) and PyTorch's (C * multiplier, 1, H, W)."""

LINEAR = Axes(lambda t: t[0, 0].t(), lambda t: t.t()[None, None])
"""A 1x1 convolution in HWIO and a linear layer (outputs, inputs)."""


@dataclass(frozen=True)
class Entry:
    """One tensor of the network under both of its names.

    Attributes:
        ours: Its key in the state_dict of `InceptionBN`.
        theirs: Its key in the foreign layout, without prefix.
        axes: How the two differ.
    """

    ours: str
    theirs: str
    axes: Axes = SAME


@dataclass(frozen=True)
class Layout:
    """One way to name the tensors of Inception-BN.

    Attributes:
        name: "cadene", "slim" or "syncbn".
        variant: Of `inception_bn` that computes the same; None where the layout does not decide it.
        entries: Every tensor that the layout can name. Where one of ours has several names there, or one of theirs
            several here, the first that applies counts.
        separator: Between the parts of a name; a prefix ends in it.
        required: Attributes of the variant without which the layout cannot express a network.
        image_size: Side of the images that the public weights were trained on, in pixels.
        resize: Of the shorter side before their centre is cut out, in pixels.
    """

    name: str
    variant: str | None
    entries: tuple[Entry, ...]
    separator: str
    required: Mapping[str, Any]
    image_size: int | None = None
    resize: int | None = None

    def by_foreign_name(self, names: Iterable[str]) -> dict[str, Entry]:
        """Which entry each of a file's names is, whatever its prefix (``module.``, ``FeatureExtractor/``).

        Args:
            names: The keys of the file.

        Returns:
            The entries by the file's keys; keys that no entry has are left out.
        """
        known = {entry.theirs: entry for entry in reversed(self.entries)}
        found = {}
        for name in names:
            tail = name.removesuffix(":0")  # as TensorFlow's variables are called
            while tail not in known and self.separator in tail:
                tail = tail.partition(self.separator)[2]
            if tail in known:
                found[name] = known[tail]
        return found


def unit_names() -> list[str]:
    """Every unit that a network can have, by our names, in the order of the table."""
    names = list(STEM_UNITS)
    for row in TABLE:
        if row.conv_1x1 is not None:
            names.append(f"inception_{row.name}.branch_1x1")
        names += [f"inception_{row.name}.branch_3x3.{part}" for part in ("reduce", "spatial")]
        names += [f"inception_{row.name}.branch_double_3x3.{part}" for part in ("reduce", "spatial_1", "spatial_2")]
        if row.projection is not None:
            names.append(f"inception_{row.name}.branch_pool.projection")
    return names
