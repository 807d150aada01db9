"""What differs between the ranks of a run and so has to be gathered for a checkpoint, which rank 0 writes."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_sum

from syncbn.collectives.world import gather_objects
from syncbn.nn import SyncBatchNorm

METRICS_KEY = "metrics_of_the_epoch"
STATISTICS_KEY = "statistics_of_ranks"
WEIGHTS_KEYS = ("state_dict", "current_model_state")
"""Where checkpoints hold running statistics; the second one is the state that goes with an averaged one."""


def add_rank_state(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Put into a checkpoint the metrics of the epoch under way, and the running statistics of all ranks.

    A collective. The metrics are summed over the ranks. Of the running statistics only those are kept that differ
    between ranks: of layers that normalise in groups.
    """
    mine = {name: metric_state(metric) for name, metric in counting_metrics(module).items()}
    names = [name for name in statistics_of_groups(module) if name in checkpoint["state_dict"]]
    statistics = {
        key: {name: checkpoint[key][name].cpu() for name in names} for key in WEIGHTS_KEYS if key in checkpoint
    }
    gathered = gather_objects((mine, statistics if names else None))
    checkpoint[METRICS_KEY] = sum_states([metrics for metrics, _ in gathered])
    if names:
        checkpoint[STATISTICS_KEY] = [of_rank for _, of_rank in gathered]


def take_rank_state(module: nn.Module, checkpoint: dict[str, Any], rank: int, num_ranks: int) -> None:
    """Restore what `add_rank_state` put there; before the weights of the checkpoint are loaded.

    Rank 0 goes on with the metrics of all. On another number of ranks the running statistics begin with the mean.
    """
    metrics = {name: metric for name, metric in module.named_modules() if isinstance(metric, Metric)}
    for name, state in checkpoint.get(METRICS_KEY, {}).items() if rank == 0 else ():
        for part, value in state.items():
            setattr(metrics[name], part, value.to(metrics[name].device))
        metrics[name]._update_count = 1  # or it would warn that nothing was counted
    saved = checkpoint.get(STATISTICS_KEY, [])
    for key in saved[0] if saved else ():
        for name, value in saved[0][key].items():
            of_ranks = [of_rank[key][name] for of_rank in saved]
            same = len(saved) == num_ranks
            checkpoint[key][name] = of_ranks[rank] if same else torch.stack(of_ranks).double().mean(0).to(value.dtype)


def counting_metrics(module: nn.Module) -> dict[str, Metric]:
    """The metrics that have counted something since they were reset and whose parts are sums, by name."""
    return {
        name: metric
        for name, metric in module.named_modules()
        if isinstance(metric, Metric)
        and metric._update_count
        and all(reduction is dim_zero_sum for reduction in metric._reductions.values())
    }


def metric_state(metric: Metric) -> dict[str, Tensor]:
    """A copy of the sums of a metric."""
    return {part: getattr(metric, part).detach().cpu().clone() for part in metric._reductions}


def sum_states(states: list[dict[str, dict[str, Tensor]]]) -> dict[str, dict[str, Tensor]]:
    """The metrics of all ranks, added up; a rank may have counted nothing yet."""
    total: dict[str, dict[str, Tensor]] = {}
    for state in states:
        for name, parts in state.items():
            known = total.get(name)
            total[name] = parts if known is None else {part: known[part] + parts[part] for part in parts}
    return total


def statistics_of_groups(module: nn.Module) -> list[str]:
    """Names of the running statistics of layers that normalise over a part of the ranks."""
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    return [
        f"{name}.{buffer}"
        for name, layer in module.named_modules()
        if isinstance(layer, SyncBatchNorm) and layer.process_group is not None and layer.process_group.size() < world
        for buffer, _ in layer.named_buffers()
    ]
