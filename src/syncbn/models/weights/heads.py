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


def choose_head(weights: Weights, classes: Sequence[str] | int, policy: HeadPolicy) -> tuple[Weights, str]:
    """Decide by the names of the classes, which the number of outputs does not tell.

    Args:
        weights: What was read.
        classes: Of the new task, in the order of the outputs; or their number, where the names are not known.
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
        return replace(weights, new_head=True), "a new classifier, as model.head=new asks"
    wanted = classes if isinstance(classes, int) else len(classes)
    found, named = len(weights.tensors[HEAD[0]]), weights.card.classes
    background = found == wanted + 1 and _begins_with_background(weights, found)
    if found != wanted and not background:
        if policy == "keep":
            raise WeightsError(
                weights.path,
                f"its classifier is of {found} classes, the data have {wanted}: leave model.head=keep out",
            )
        return weights, ""
    if policy == "keep" or isinstance(classes, int):
        return weights, ""
    if named is None:
        return (
            weights,
            f"the classifier of {found} classes, which the file does not name, is taken over (unless model.head=new)",
        )
    if tuple(named[background:]) == tuple(classes):
        return weights, ""
    other, ours = next(pair for pair in zip(named[background:], classes, strict=True) if pair[0] != pair[1])
    return replace(weights, new_head=True), (
        f"the classifier is of {wanted} other classes ({other!r} where the data have {ours!r}): a new one;"
        " model.head=keep takes it over"
    )


def fit_head(tensors: dict[str, Tensor], state: dict[str, Tensor], weights: Weights) -> list[str]:
    """Adapt or leave out the classifier among the tensors, and say what was done."""
    tensors.pop(PROXIES, None)  # of the training alone
    head = {name: tensors.pop(name) for name in HEAD if name in tensors}
    if HEAD[0] not in state:  # an embedding in its place
        return []
    for name in EMBEDDING:
        tensors.pop(name, None)
    if weights.new_head:
        return []
    if not head:
        return ["the file has no classifier: that of the network is new"]
    weight, wanted, said = head[HEAD[0]], len(state[HEAD[0]]), []
    found = len(weight)
    without_background = found == wanted + 1 and _begins_with_background(weights, found)
    if found != wanted and not without_background:
        return [f"the classifier is of {found} classes: a new one of {wanted} classes"]
    if HEAD[1] not in head:
        head[HEAD[1]] = weight.new_zeros(found)
        said.append(f"{weights.key(HEAD[1])} is missing: zeros in its place")
    if without_background:
        head = {name: tensor[1:] for name, tensor in head.items()}
        said.append(f"{found} classes, the background first: taken without it")
    tensors.update(head)
    return said


def _begins_with_background(weights: Weights, classes: int) -> bool:
    """Whether the first class is TF-slim's background: by its name, or, of a file without names, by their number."""
    names = weights.card.classes
    return names[0] == BACKGROUND if names else weights.card.layout == "slim" and classes == 1001
