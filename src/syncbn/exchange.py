"""One synchronisation of several activations: local sums out, statistics in, and the same for the gradients.

Letters: N batch, C channels, M elements per channel over all ranks, P ranks.
The messages, float64: forward [sum x (C), sum x^2 (C), M of this rank] an activation, backward [sum dy (C),
sum dy * (x - mean) (C)].
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn import ops
from syncbn.distributed import ID_LENGTH, Label, Reduction


class Statistics(NamedTuple):
    """Of one activation over all ranks: mean and biased variance (C), and M (), all float64."""

    mean: Tensor
    var: Tensor
    M: Tensor


class Route(NamedTuple):
    """Whom an exchange is with: the group (None: this rank alone) and the labels of its two messages."""

    group: dist.ProcessGroup | None
    forward: Label
    backward: Label


class Memory:
    """Messages and their sums, kept so that a recomputed forward (activation checkpointing) need not reduce again.

    A recomputation is recognised by its local sums: the nearest remembered message is the one it repeats.
    """

    def __init__(self, size: int = 64) -> None:
        self.entries: deque[tuple[Tensor, Tensor]] = deque(maxlen=size)

    def __deepcopy__(self, memo: object) -> "Memory":
        return Memory()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Memory, ()

    def keep(self, message: Tensor, totals: Tensor) -> None:
        """Remember what `message` was summed up to."""
        self.entries.append((message, totals))

    def recall(self, message: Tensor) -> Tensor:
        """The sums that went with `message`, found without reading a value on the host."""
        fitting = [(m, t) for m, t in self.entries if m.shape == message.shape and m.device == message.device]
        messages = torch.stack([m for m, _ in fitting])
        nearest = (messages - message).abs().amax(1).argmin()
        return torch.stack([t for _, t in fitting])[nearest]


class PendingGradient(NamedTuple):
    """Of one activation, between the two passes of the backward."""

    dy: Tensor
    x: Tensor
    pivot: Tensor | None
    statistics: Statistics
    var_eps: Tensor
    scale: Tensor
    sums: Tensor  # (2, C) float64: sum dy, sum dy * (x - mean)

    def input_gradient(self, totals: Tensor) -> Tensor:
        """Dx, given the sums over all ranks."""
        mean, _, M = self.statistics
        means = totals / M.clamp(min=1)
        return ops.input_gradient(self.dy, self.x, self.pivot, mean, self.scale, means[0], means[1] / self.var_eps)


class Exchange:
    """The two messages of one synchronisation.

    Args:
        route: with whom.
        memory: where sums are kept for a forward that may be recomputed.
    """

    def __init__(self, route: Route, memory: Memory) -> None:
        self.route, self.memory = route, memory
        self.recomputed = bool(memory.entries) and _inside_backward()
        self.shifted: list[ops.Shifted] = []
        self.results: list[Statistics] = []
        self.reduction: Reduction | None = None
        self.gradient: list[PendingGradient] | None = None
        self.gradient_reduction: Reduction | None = None

    def launch(self, inputs: Sequence[Tensor]) -> None:
        """Sum the inputs (N, C, ...) locally and send the message."""
        parts: list[Tensor] = []
        for x in inputs:
            sums, shifted = ops.input_sums(ops.dense(x))
            parts += [sums.view(-1), sums.new_full((1,), x.numel() // x.shape[1])]
            self.shifted.append(shifted)
        message = torch.cat([*parts, parts[0].new_zeros(ID_LENGTH)])
        self.local = message[:-ID_LENGTH]
        self.to_keep = self.local.clone() if _may_be_recomputed() and not self.recomputed else None
        if self.route.group is not None and not self.recomputed:
            self.reduction = Reduction(message, self.route.group, self.route.forward)

    def receive(self) -> None:
        """Wait for the message; fills in `results`, the statistics of each input.

        Raises:
            ValueError: one value per channel in all.
        """
        totals = self.local
        if self.recomputed:
            totals = self.memory.recall(self.local)
        elif self.reduction is not None:
            totals = self.reduction.wait()
        if self.to_keep is not None:
            self.memory.keep(self.to_keep, totals)
        self.results = statistics_of(totals, [shifted.values.shape[1] for shifted in self.shifted])
        for statistics, shifted in zip(self.results, self.shifted, strict=True):
            self._refuse_single_value(statistics.M, shifted.values)
        self.reduction = None

    def launch_gradient(self, pending: list[PendingGradient]) -> None:
        """Send the sums of the backward."""
        self.gradient, self.gradient_reduction = pending, None
        message = torch.cat([*(p.sums.view(-1) for p in pending), pending[0].sums.new_zeros(ID_LENGTH)])
        self.gradient_local = message[:-ID_LENGTH]
        if self.route.group is not None:
            self.gradient_reduction = Reduction(message, self.route.group, self.route.backward)

    def input_gradients(self, needed: Sequence[bool]) -> list[Tensor | None]:
        """Wait for the sums of the backward; dx of each input, None where not needed."""
        pending, self.gradient = self.gradient, None
        if pending is None:  # second derivatives were asked for, and computed otherwise
            return [None] * len(needed)
        reduction, self.gradient_reduction = self.gradient_reduction, None
        totals = self.gradient_local if reduction is None else reduction.wait()
        parts = totals.split([p.sums.numel() for p in pending])
        return [
            p.input_gradient(part.view(2, -1)) if wanted else None
            for p, part, wanted in zip(pending, parts, needed, strict=True)
        ]

    def _refuse_single_value(self, M: Tensor, x: Tensor) -> None:
        if self.route.group is None:
            single, P = x.numel() == x.shape[1], 1
        else:  # elsewhere than on a CPU, reading M would stall the device
            single, P = M.device.type == "cpu" and M.item() == 1, self.route.group.size()
        if single:
            raise ValueError(
                f"expected more than 1 value per channel when training, got 1 over all ranks ({P}); this rank's input "
                f"has size {list(x.shape)}: give a larger batch"
            )


def statistics_of(totals: Tensor, channels: Sequence[int]) -> list[Statistics]:
    """The statistics of each input from a message's sums: var = E[x^2] - E[x]^2, which float64 can afford."""
    statistics = []
    for part in totals.split([2 * C + 1 for C in channels]):
        M = part[-1]
        moments = (part[:-1] / M.clamp(min=1)).view(2, -1)
        mean = moments[0]
        var = torch.addcmul(moments[1], mean, mean, value=-1).clamp(min=0)
        statistics.append(Statistics(mean, var, M))
    return statistics


def _may_be_recomputed() -> bool:
    """Whether this forward may be inside an activation checkpoint (reentrant or not), whose backward runs it again."""
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def _inside_backward() -> bool:
    return torch._C._current_graph_task_id() != -1
