"""Modules: the synchronised BatchNorm (`sync_batch_norm`) and what is done with whole networks of it.

`convert` makes any network's layers synchronised and back, `population` estimates statistics for inference, `fold`
merges layers into the convolutions before them. `checks` are the messages to users.
"""

from syncbn.nn.convert import convert_sync_batchnorm, revert_sync_batchnorm
from syncbn.nn.fold import fold_batch_norm
from syncbn.nn.per_activation import PerActivationBatchNorm
from syncbn.nn.population import estimate_population_statistics
from syncbn.nn.sync_batch_norm import (
    BatchNorm,
    PendingBatchNorm,
    SyncBatchNorm,
    start_sync_batch_norm,
    sync_batch_norm_group,
)

__all__ = [
    "BatchNorm",
    "PendingBatchNorm",
    "PerActivationBatchNorm",
    "SyncBatchNorm",
    "convert_sync_batchnorm",
    "estimate_population_statistics",
    "fold_batch_norm",
    "revert_sync_batchnorm",
    "start_sync_batch_norm",
    "sync_batch_norm_group",
]
