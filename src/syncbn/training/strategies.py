"""DistributedDataParallel as this trainer uses it."""

from datetime import timedelta
from inspect import signature
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch.nn.parallel import DistributedDataParallel

TIMEOUT_SECONDS = 1800.0

# What broadcast_buffers=False is called by newer versions of torch, which deprecate that name.
BUFFER_OPTION = "forward_sync_buffers"
if BUFFER_OPTION not in signature(DistributedDataParallel.__init__).parameters:
    BUFFER_OPTION = "broadcast_buffers"


class SynchronisedDDPStrategy(DDPStrategy):
    """DDP for networks whose BatchNorm is synchronised.

    Running statistics are equal on all ranks by construction, so buffers are not broadcast at every step.
    Gradients are views into the buckets of the all-reduce, which saves a copy.

    Args:
        timeout_seconds: How long a rank waits for the others in a collective before it gives up.
        **options: Of Lightning's ``DDPStrategy`` and of ``torch.nn.parallel.DistributedDataParallel``.
    """

    strategy_name = "syncbn_ddp"

    def __init__(self, timeout_seconds: float = TIMEOUT_SECONDS, **options: Any) -> None:
        options = {BUFFER_OPTION: False, "gradient_as_bucket_view": True} | options
        super().__init__(timeout=timedelta(seconds=timeout_seconds), **options)


if SynchronisedDDPStrategy.strategy_name not in StrategyRegistry:
    StrategyRegistry.register(
        SynchronisedDDPStrategy.strategy_name,
        SynchronisedDDPStrategy,
        description="DDP without the broadcast of buffers, for synchronised BatchNorm",
    )
