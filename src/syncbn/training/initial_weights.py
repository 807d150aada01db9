"""The weights that a fine-tuning starts from."""

from pathlib import Path

import torch
from torch import nn

PREFIX = "network."
HEAD = "classifier."


def load_weights(network: nn.Module, path: str) -> None:
    """Load a checkpoint of `ImageClassifier` into a network; a head of other shape is left as it is.

    Raises:
        ValueError: The file is missing or no such checkpoint, or the networks differ in more than the head.
    """
    if not Path(path).is_file():
        raise ValueError(f"weights: there is no file {path}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
        state = {name.removeprefix(PREFIX): value for name, value in saved.items() if name.startswith(PREFIX)}
    except Exception as error:  # whatever unpickling junk may raise
        raise ValueError(f"weights: {path} is not a checkpoint of syncbn's: {type(error).__name__}") from error
    own = network.state_dict()
    heads = {name for name in {**own, **state} if name.startswith(HEAD)}
    if any(name not in own or name not in state or own[name].shape != state[name].shape for name in heads):
        state = {name: value for name, value in state.items() if name not in heads}
        state |= {name: own[name] for name in heads if name in own}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        _, first, *more = str(error).splitlines()
        raise ValueError(
            f"weights: {path} is of another network: {first.strip()} ({len(more)} further differences)"
        ) from error
