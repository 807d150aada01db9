"""Modules: the synchronised BatchNorm and what is done with whole networks of it."""

from syncbn.nn.sync_batch_norm import SyncBatchNorm, start_sync_batch_norm, sync_batch_norm_group

__all__ = ["SyncBatchNorm", "start_sync_batch_norm", "sync_batch_norm_group"]
