"""Synchronised BatchNorm for PyTorch: P ranks normalise as one batch, exactly.

The layer, from the bottom: `ops`, `collectives`, `functional`, `nn`. Around it: `models`, `data`, `training`.
`syncbn.models` and `syncbn.training` are imported when first used: this module costs little more than torch.
"""

import importlib
from types import ModuleType

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


def __getattr__(name: str) -> ModuleType:
    if name in ("models", "data", "training"):
        return importlib.import_module(f"syncbn.{name}")
    raise AttributeError(f"module 'syncbn' has no attribute {name!r}")
