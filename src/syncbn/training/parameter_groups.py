"""Which parameters are decayed: convolutions and linear layers, and nothing else unless asked for."""

from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

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
    """
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
    decays = {"weights": weight_decay, "norms": norm_weight_decay, "biases": bias_weight_decay}
    return [
        {"params": parameters, "weight_decay": decays[name], "name": name}
        for name, parameters in groups.items()
        if parameters
    ]
