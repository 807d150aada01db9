"""The classifier of a file: whether a network takes it over, or begins with a new one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor

from syncbn.models.weights.files import WeightsError
from syncbn.models.weights.reading import Weights

HeadPolicy = Literal["auto", "new", "keep"]
"""What a training does with the classifier of a file:

- "auto": taken over where it is of the same classes in the same order. Where the file does not name its classes, their
  number decides.
- "new": drawn anew.
- "keep": taken over whatever its classes are called; an error where their number differs.
"""

HEAD = ("classifier.weight", "classifier.bias")
EMBEDDING = ("classifier.embedding.weight", "classifier.embedding.bias")
PROXIES = "classifier.proxies"
BACKGROUND = "background"


def choose_head(weights: Weights, classes: Sequence[str], policy: HeadPolicy) -> tuple[Weights, str]:
    """Decide by the names of the classes, which the number of outputs does not tell.

    Args:
        weights: What was read.
        classes: Of the new task, in the order of the outputs.
        policy: See `HeadPolicy`.

    Returns:
        The weights, without their classifier where the network is to have a new one; and what is to be said about it,
        or nothing.

    Raises:
        ValueError: "keep", and the file has no classifier of so many classes.
    """
    if HEAD[0] not in weights.tensors:
        if policy == "keep":
            raise WeightsError(weights.path, "it has no classifier to keep: leave model.head=keep out")
        return weights, ""
    if policy == "new":
        return _without_head(weights), "a new classifier, as model.head=new asks"
    found, named = len(weights.tensors[HEAD[0]]), weights.card.classes
    background = found == len(classes) + 1 and _begins_with_background(weights, found)
    if found != len(classes) and not background:
        if policy == "keep":
            raise WeightsError(
                weights.path,
                f"its classifier is of {found} classes, the data have {len(classes)}: leave model.head=keep out",
            )
        return weights, ""
    if policy == "keep":
        return weights, ""
    if named is None:
        return (
            weights,
            f"the classifier of {found} classes, which the file does not name, is taken over (unless model.head=new)",
        )
    if tuple(named[background:]) == tuple(classes):
        return weights, ""
    other, ours = next(pair for pair in zip(named[background:], classes, strict=True) if pair[0] != pair[1])
    return _without_head(weights), (
        f"the classifier is of {len(classes)} other classes ({other!r} where the data have {ours!r}): a new one;"
        " model.head=keep takes it over"
    )


def _without_head(weights: Weights) -> Weights:
    return replace(weights, tensors={name: tensor for name, tensor in weights.tensors.items() if name not in HEAD})


def fit_head(tensors: dict[str, Tensor], state: dict[str, Tensor], weights: Weights) -> list[str]:
    """Adapt or leave out the classifier among the tensors, and say what was done."""
    tensors.pop(PROXIES, None)  # of the training alone
    if HEAD[0] not in state:  # an embedding in its place
        for name in HEAD:
            tensors.pop(name, None)
        return []
    for name in EMBEDDING:
        tensors.pop(name, None)
    wanted = len(state[HEAD[0]])
    head = [tensors[name] for name in HEAD if name in tensors]
    if len(head) < 2:
        for name in HEAD:
            tensors.pop(name, None)
        return [] if HEAD[0] in weights.keys else ["the file has no classifier: that of the network is new"]
    found = len(head[0])
    if found == wanted:
        return []
    if found == wanted + 1 and _begins_with_background(weights, found):
        tensors.update({name: tensor[1:] for name, tensor in zip(HEAD, head, strict=True)})
        return [f"{found} classes, the background first: taken without it"]
    for name in HEAD:
        del tensors[name]
    return [f"the classifier is of {found} classes: a new one of {wanted} classes"]


def _begins_with_background(weights: Weights, classes: int) -> bool:
    """Whether the first class is TF-slim's background: by its name, or, of a file without names, by their number."""
    names = weights.card.classes
    return names[0] == BACKGROUND if names else weights.card.layout == "slim" and classes == 1001
