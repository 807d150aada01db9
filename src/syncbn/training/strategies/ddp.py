"""DistributedDataParallel as this trainer uses it."""

from datetime import timedelta
from inspect import signature
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, StrategyRegistry
from torch.nn.parallel import DistributedDataParallel

from syncbn.training.launch.attempts import join_attempt

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
        gradient_as_bucket_view: Whether gradients are such views.
        broadcast_buffers: Whether rank 0's are, at every step. Null, like ``forward_sync_buffers`` null,
            do not: a config that names this class holds them so.
        **options: Of Lightning's ``DDPStrategy`` and of ``torch.nn.parallel.DistributedDataParallel``.
    """

    strategy_name = "syncbn_ddp"

    def __init__(
        self,
        timeout_seconds: float = TIMEOUT_SECONDS,
        gradient_as_bucket_view: bool = True,
        broadcast_buffers: bool | None = None,
        **options: Any,
    ) -> None:
        wanted = options.pop("forward_sync_buffers", None)
        options[BUFFER_OPTION] = bool(broadcast_buffers if wanted is None else wanted)
        super().__init__(
            timeout=timedelta(seconds=timeout_seconds), gradient_as_bucket_view=gradient_as_bucket_view, **options
        )

    def setup_distributed(self) -> None:
        """Form the process group, also where torchrun has started the ranks again."""
        join_attempt(self, self._timeout)
        super().setup_distributed()


if SynchronisedDDPStrategy.strategy_name not in StrategyRegistry:
    StrategyRegistry.register(
        SynchronisedDDPStrategy.strategy_name,
        SynchronisedDDPStrategy,
        description="DDP without the broadcast of buffers, for synchronised BatchNorm",
    )
