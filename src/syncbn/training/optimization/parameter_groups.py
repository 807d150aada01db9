"""Which parameters are decayed, and how fast they are learned."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from syncbn.training.finetuning.selection import is_selected, select_parameters

NORMALISATIONS = (_NormBase, nn.LayerNorm, nn.GroupNorm)


def parameter_groups(
    module: nn.Module, weight_decay: float, *, norm_weight_decay: float = 0.0, bias_weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Split the trainable parameters of a network by what they do.

    Args:
        module: The network.
        weight_decay: Of the weights of convolutions and linear layers, and of any other parameter that is
            neither of the following.
        norm_weight_decay: Of the gammas and betas of normalisation layers.
        bias_weight_decay: Of the biases of other layers.

    Returns:
        Parameter groups for an optimiser, named "weights", "norms" and "biases"; empty ones are left out. A
        parameter shared by several modules appears once.

    Raises:
        ValueError: A weight decay is negative, which an optimiser checks of its default alone.
    """
    decays = {"weight_decay": weight_decay, "norm_weight_decay": norm_weight_decay}
    for option, decay in (decays | {"bias_weight_decay": bias_weight_decay}).items():
        if decay < 0:
            raise ValueError(f"{option}={decay} must not be negative: the weights would grow")
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "norms": [], "biases": []}
    seen: set[int] = set()
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if not parameter.requires_grad or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if isinstance(owner, NORMALISATIONS):
                groups["norms"].append(parameter)
            else:
                groups["biases" if name == "bias" else "weights"].append(parameter)
    decay_of = {"weights": weight_decay, "norms": norm_weight_decay, "biases": bias_weight_decay}
    return [
        {"params": parameters, "weight_decay": decay_of[name], "name": name}
        for name, parameters in groups.items()
        if parameters
    ]


def scale_groups(
    groups: list[dict[str, Any]], module: nn.Module, factors: Mapping[str, float], learning_rate: float
) -> list[dict[str, Any]]:
    """Give the parameters that patterns mean learning rates of their own.

    Args:
        groups: From `parameter_groups` of the module.
        module: The network.
        factors: From a pattern (see `syncbn.training.finetuning.selection`) to a factor on the learning rate. Of
            several patterns that match a parameter, the last counts; what none matches has 1.
        learning_rate: What the factors are of.

    Returns:
        The groups divided by factor, with "lr" and the factor in the name; those of factor 1 come first, with their
        names as they were.

    Raises:
        ValueError: A factor is not positive; a pattern matches nothing, or nothing that is trained.
    """
    for pattern, factor in factors.items():
        if factor <= 0:
            raise ValueError(f"learning_rate_factors: {pattern}: {factor} must be positive; model.freeze is to freeze")
        matched = select_parameters(module, [pattern], "learning_rate_factors")
        if not any(parameter.requires_grad for parameter in matched.values()):
            raise ValueError(
                f"learning_rate_factors: all that {pattern!r} matches is frozen by model.freeze or model.batch_norm:"
                " leave it out of one of them"
            )
    factor_of = {id(parameter): _factor(name, factors) for name, parameter in module.named_parameters()}
    scaled = []
    for factor in sorted(set(factor_of.values()), key=lambda factor: (factor != 1, factor)):
        for group in groups:
            parameters = [parameter for parameter in group["params"] if factor_of[id(parameter)] == factor]
            name = group["name"] if factor == 1 else f"{group['name']} x{factor:g}"
            if parameters:
                scaled.append({**group, "params": parameters, "lr": factor * learning_rate, "name": name})
    return scaled


def _factor(name: str, factors: Mapping[str, float]) -> float:
    return next((factor for pattern, factor in reversed(list(factors.items())) if is_selected(name, [pattern])), 1.0)
