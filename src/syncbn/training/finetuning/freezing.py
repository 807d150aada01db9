"""What of a network is trained: freezing by pattern, and what fine-tuning does with BatchNorm."""

from collections.abc import Sequence
from typing import Literal, get_args

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn.models.network import InceptionModule
from syncbn.training.finetuning.selection import is_selected, select_parameters

BatchNormPolicy = Literal["train", "freeze", "partial", "estimate"]
"""What is done with the BatchNorm layers:

- "train": normalise by the global batch, learn gamma and beta, follow the statistics.
- "freeze": normalise by the statistics that were loaded; gamma and beta stay, and no message is sent.
- "partial": "freeze" for all but the first layer, which sees the new images' statistics (Wang et al. 2016,
  "Temporal segment networks", section 3.2).
- "estimate": before the first step, estimate the statistics anew on the training images by Algorithm 2; then "freeze".
"""


def freeze_network(network: nn.Module, patterns: Sequence[str], batch_norm: BatchNormPolicy) -> tuple[str, ...]:
    """Take parameters out of the training, in place.

    Args:
        network: The network; its parameters' ``requires_grad`` is set.
        patterns: What is frozen, see `syncbn.training.finetuning.selection`.
            A BatchNorm layer within it keeps its statistics.
        batch_norm: What is done with the other BatchNorm layers.

    Returns:
        Names of the BatchNorm layers that must stay in eval mode, in the order of the network.

    Raises:
        ValueError: A pattern matches nothing, nothing would be left to train, or the choices contradict each other.
    """
    if batch_norm not in get_args(BatchNormPolicy):
        raise ValueError(f"batch_norm={batch_norm!r} must be one of {', '.join(get_args(BatchNormPolicy))}")
    layers = {name: layer for name, layer in network.named_modules() if isinstance(layer, _BatchNorm)}
    if batch_norm != "train" and not layers:
        raise ValueError(f"batch_norm={batch_norm!r} has no meaning in a network without BatchNorm: leave it out")
    for parameter in select_parameters(network, patterns, "freeze").values():
        parameter.requires_grad_(False)
    trained = _trained_layers(list(layers), patterns, batch_norm)
    frozen = tuple(name for name in layers if name not in trained)
    for name in frozen:
        layers[name].requires_grad_(False)
    _check_siblings(network, frozen)
    if not any(parameter.requires_grad for parameter in network.parameters()):
        raise ValueError(
            f"freeze={list(patterns)} leaves nothing to train: leave out the last layer. (To estimate the statistics"
            " of BatchNorm alone, call syncbn.estimate_population_statistics.)"
        )
    return frozen


def _trained_layers(names: list[str], patterns: Sequence[str], batch_norm: BatchNormPolicy) -> list[str]:
    """Names of the BatchNorm layers that normalise by the batch."""
    if batch_norm == "train":
        return [name for name in names if not is_selected(name, patterns)]
    if batch_norm != "partial":
        return []
    if is_selected(names[0], patterns):
        raise ValueError(
            f"batch_norm='partial' trains the first BatchNorm layer, {names[0]}, which freeze={list(patterns)} holds:"
            " take batch_norm='freeze', or leave the layer out of freeze"
        )
    return names[:1]


def _check_siblings(network: nn.Module, frozen: Sequence[str]) -> None:
    """Refuse to freeze one of several layers that `InceptionModule` normalises side by side, as one tensor."""
    for path, module in network.named_modules():
        if not isinstance(module, InceptionModule):
            continue
        siblings = [f"{path}.{branch}.bn" for branch in ("branch_3x3.reduce", "branch_double_3x3.reduce")]
        if module.branch_1x1 is not None:
            siblings.insert(0, f"{path}.branch_1x1.bn")
        held = [name for name in siblings if name in frozen]
        if held and len(held) < len(siblings):
            free = next(name for name in siblings if name not in frozen)
            raise ValueError(
                f"freeze holds {held[0]} but not {free}, which lies beside it in one tensor: freeze both or neither"
            )
