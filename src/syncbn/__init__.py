"""Synchronised BatchNorm for PyTorch: P ranks normalise as one batch, exactly.

The layer, from the bottom: `ops`, `collectives`, `functional`, `nn`. Around it: `models`, `data`, `training`.
Names are imported when one of them is first used: the command answers ``--help`` without torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from syncbn.collectives.agreement import LayerMismatch
    from syncbn.collectives.groups import new_group
    from syncbn.grouping import group_messages
    from syncbn.nn import (
        SyncBatchNorm,
        convert_sync_batchnorm,
        estimate_population_statistics,
        fold_batch_norm,
        revert_sync_batchnorm,
        sync_batch_norm_group,
    )
    from syncbn.recomputing import recompute_activations

__version__ = "0.1.0"
__all__ = [
    "LayerMismatch",
    "SyncBatchNorm",
    "convert_sync_batchnorm",
    "estimate_population_statistics",
    "fold_batch_norm",
    "group_messages",
    "new_group",
    "recompute_activations",
    "revert_sync_batchnorm",
    "sync_batch_norm_group",
]

ELSEWHERE = {
    "LayerMismatch": "collectives.agreement",
    "group_messages": "grouping",
    "new_group": "collectives.groups",
    "recompute_activations": "recomputing",
}
"""Where public names are that are not in `syncbn.nn`."""

SUBMODULES = (
    "collectives",
    "data",
    "exchange",
    "functional",
    "grouping",
    "models",
    "nn",
    "ops",
    "recomputing",
    "training",
)
"""Parts that can be used after ``import syncbn`` alone."""


def __getattr__(name: str) -> Any:
    if name in SUBMODULES:
        return importlib.import_module(f"syncbn.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'syncbn' has no attribute {name!r}")
    for public in __all__:  # all of them, so that code that torch.compile traces later finds plain attributes
        globals()[public] = getattr(importlib.import_module(f"syncbn.{ELSEWHERE.get(public, 'nn')}"), public)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *SUBMODULES})
