"""Weights of the classes in the loss."""

from collections.abc import Sequence

import torch
from torch import Tensor


def balanced_weights(counts: Sequence[int], classes: Sequence[str]) -> Tensor:
    """Weights that give all classes the same say: N / (K * images of the class), whose mean over the images is 1.

    Args:
        counts: Training images of each of the K classes, N in all.
        classes: Their names.

    Returns:
        float32, shape (K,).

    Raises:
        ValueError: A class has no training image.
    """
    empty = [name for name, count in zip(classes, counts, strict=True) if count == 0]
    if empty:
        raise ValueError(
            f"class_weights='balanced': {len(empty)} of {len(classes)} classes have no training image, such as"
            f" {empty[0]!r}: give a list of weights, or leave the classes out"
        )
    total = sum(counts)
    return torch.tensor([total / (len(counts) * count) for count in counts], dtype=torch.float32)


def given_weights(weights: Sequence[float], num_classes: int) -> Tensor:
    """A user's weights as they are.

    Returns:
        float32, shape (num_classes,).

    Raises:
        ValueError: There is not one weight for each class, or one is not positive.
    """
    if len(weights) != num_classes:
        raise ValueError(f"class_weights has {len(weights)} weights, the data have {num_classes} classes: one for each")
    given = torch.tensor(weights, dtype=torch.float32)
    if not bool((torch.isfinite(given) & (given > 0)).all()):
        raise ValueError(f"class_weights={list(weights)} must be positive numbers")
    return given
