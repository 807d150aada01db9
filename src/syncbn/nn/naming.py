"""What a layer is called: its qualified name in the model that holds it, so that errors and checks can name it."""

import gc
from collections.abc import Sequence

from torch import nn

from syncbn.collectives.agreement import LayerName


def layer_names(layers: Sequence[nn.Module]) -> tuple[LayerName, ...]:
    """A name for each layer, found once and kept."""
    if any("_layer_name" not in layer.__dict__ for layer in layers):
        _name_layers(layers)
    return tuple(layer.__dict__["_layer_name"] for layer in layers)


def _name_layers(layers: Sequence[nn.Module]) -> None:
    """A module does not know its parent, so look through all living modules: once, at a model's first message.

    Other threads may be building some of them.
    """
    modules = [m for m in gc.get_objects() if issubclass(type(m), nn.Module)]
    parents: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in modules:
        for name, child in list(module.__dict__.get("_modules", {}).items()):
            parents.setdefault(id(child), []).append((module, name))
    kinds = {type(layer) for layer in layers}
    for layer in [m for m in modules if type(m) in kinds and "_serial" in m.__dict__] + list(layers):
        if "_layer_name" not in layer.__dict__:
            path, kind = _qualified_name(layer, parents), f"{type(layer).__name__}({layer.num_features})"
            if path or layer in layers:  # others may become part of a model before their first message
                layer.__dict__["_layer_name"] = LayerName(path, kind, *layer._serial)


def _qualified_name(module: nn.Module, parents: dict[int, list[tuple[nn.Module, str]]], depth: int = 0) -> str:
    paths = []
    for parent, name in parents.get(id(module), []) if depth < 64 else []:
        above = _qualified_name(parent, parents, depth + 1)
        paths.append(f"{above}.{name}" if above else name)
    return max(paths, key=lambda path: (path.count("."), path), default="")
