"""A network's weights as a file, in our layout or in one of the public ones."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from syncbn.models.network import InceptionBN
from syncbn.models.weights.cadene import CADENE
from syncbn.models.weights.card import CARD_KEY, ModelCard, card_path
from syncbn.models.weights.layout import Layout
from syncbn.models.weights.slim import SLIM
from syncbn.nn import BatchNorm

SUFFIXES = {"safetensors": ".safetensors", "cadene": ".pth", "slim": ".npz"}
"""Formats of weights, and how their files end."""


def require_folder(output: Path) -> None:
    """Make sure that a file can be put where it shall be.

    Raises:
        ValueError: There is no such folder.
    """
    if not output.absolute().parent.is_dir():
        raise ValueError(f"--output {output}: there is no folder {output.parent}: make it, or name another")


def write_weights(network: InceptionBN, card: ModelCard, path: Path, format: str) -> None:
    """Write the weights of a network, and its card in or beside the file.

    Args:
        network: Not folded.
        card: Of the network.
        path: The file; an existing one is replaced once the new one is complete.
        format: "safetensors" (our layout, the card in its metadata), "cadene" (a state_dict for ``torch.load``) or
            "slim" (an .npz of TF-slim's variables, under the prefix ``InceptionV2/``).

    Raises:
        ValueError: The layout cannot express the network; the message names the attribute.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if format == "safetensors":
            _write_safetensors(network.state_dict(), card, temporary)
        elif format == "cadene":
            torch.save(to_layout(network, CADENE), temporary)
        else:
            arrays: dict[str, Any] = {
                f"InceptionV2/{name}": tensor.numpy() for name, tensor in to_layout(network, SLIM).items()
            }
            with temporary.open("wb") as file:
                np.savez(file, **arrays)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    if format != "safetensors":
        card_path(path).write_text(card.to_json())


def _write_safetensors(state: dict[str, Tensor], card: ModelCard, path: Path) -> None:
    from safetensors.torch import save

    has_head = card.num_classes or card.embedding_dimension
    present = {name: tensor.contiguous() for name, tensor in state.items() if has_head or "classifier" not in name}
    path.write_bytes(save(present, {CARD_KEY: card.to_json(), "format": "pt"}))


def to_layout(network: InceptionBN, layout: Layout) -> dict[str, Tensor]:
    """The tensors of a network by the names of a public layout, in its order of the axes.

    Raises:
        ValueError: The layout cannot express the network.
    """
    check_expressible(network, layout)
    state = network.state_dict()
    renamed: dict[str, Tensor] = {}
    done: set[str] = set()
    for entry in layout.entries:
        if entry.ours in done:
            continue  # a second name of the same tensor
        if entry.ours in state:
            renamed[entry.theirs] = entry.axes.to_theirs(state[entry.ours]).contiguous().cpu()
            done.add(entry.ours)
        elif layout is CADENE and entry.ours.endswith(".conv.bias"):  # its convolutions have one, its reader wants it
            weight = state[entry.ours.removesuffix("bias") + "weight"]
            renamed[entry.theirs] = weight.new_zeros(len(weight)).cpu()
    if not network.variant.gamma:
        renamed = {name: tensor for name, tensor in renamed.items() if not name.endswith("/gamma")}
    return renamed


def check_expressible(network: InceptionBN, layout: Layout) -> None:
    """Refuse a network that a layout cannot express, or whose reader would compute something else with it.

    Raises:
        ValueError: The message names the attribute, its value and what the layout has.
    """
    known = {entry.ours for entry in layout.entries}
    unknown = [name for name in network.state_dict() if name.startswith("classifier.") and name not in known]
    if unknown:
        raise ValueError(f"the layout {layout.name} has no {unknown[0]}: export it as safetensors, which holds any")
    attributes = {name: getattr(network.variant, name) for name in layout.required}
    required = dict(layout.required)
    standard = {"norm": "batch", "activation": "relu", "stem": "imagenet", "local_response_norm": False}
    for name, value in (standard | {"per_activation_head": None}).items():
        attributes[name] = network.arguments.get(name, value)
        required[name] = value
    for name, value in attributes.items():
        if value != required[name]:
            raise ValueError(
                f"the layout {layout.name} has {name}={required[name]!r}, this network {value!r}:"
                " export it as safetensors, which holds any"
            )
    for name, layer in network.named_modules():
        if isinstance(layer, BatchNorm) and layer.eps != network.variant.eps:
            raise ValueError(f"the layout {layout.name} has one eps, but {name} has eps={layer.eps}")
