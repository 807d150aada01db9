"""Synchronised BatchNorm for PyTorch: P ranks normalise as one batch."""

from syncbn.nn import SyncBatchNorm, sync_batch_norm_group

__version__ = "0.1.0"
__all__ = ["SyncBatchNorm", "sync_batch_norm_group"]
