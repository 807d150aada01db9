"""One synchronisation of several activations: local sums out, statistics in, and the same for the gradients.

Letters: N batch, C channels, M elements per channel over all ranks, P ranks.
The messages, float64: forward [sum x (C), sum x^2 (C)] of each activation, then the number of elements per channel of
each; backward [sum dy (C), sum dy * (x - mean) (C)] of each. Both end with the id of the layers.
"""

from collections import deque
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn import ops
from syncbn.distributed import ID_LENGTH, Label, Reduction


class Statistics(NamedTuple):
    """Of one activation: mean and biased variance (C), float64 if ranks exchanged them, and M (on a device a tensor)."""

    mean: Tensor
    var: Tensor
    M: float | Tensor

    def detach(self) -> "Statistics":
        """The same without a gradient."""
        return Statistics(*(s.detach() if isinstance(s, Tensor) else s for s in self))  # type: ignore[arg-type]

    @property
    def unbiased_var(self) -> Tensor:
        """Var * M / (M - 1), (C)."""
        return self.var * (self.M / at_least_one(self.M - 1))


class Route(NamedTuple):
    """Whom an exchange is with, and the labels of its two messages."""

    group: dist.ProcessGroup
    forward: Label
    backward: Label


class Memory:
    """Messages and their sums, kept so that a recomputed forward (activation checkpointing) need not reduce again.

    A recomputation is recognised by its local sums: the nearest remembered message is the one it repeats. Without a
    group there is nothing to remember but that there was a forward.
    """

    def __init__(self, size: int = 64) -> None:
        self.entries: deque[tuple[Tensor, Tensor]] = deque(maxlen=size)

    def __deepcopy__(self, memo: object) -> "Memory":
        return Memory()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Memory, ()

    def is_repeated(self) -> bool:
        """Whether the forward that runs now repeats a remembered one: it runs inside a backward."""
        return bool(self.entries) and torch._C._current_graph_task_id() != -1

    def keep(self, message: Tensor, totals: Tensor) -> None:
        """Remember what `message` was summed up to."""
        self.entries.append((message, totals))

    def keep_nothing(self) -> None:
        """Remember a forward that sent no message."""
        if not self.entries:
            self.keep(torch.empty(0), torch.empty(0))

    def recall(self, message: Tensor) -> Tensor:
        """The sums that went with `message`, found without reading a value on the host."""
        fitting = [(m, t) for m, t in self.entries if m.shape == message.shape and m.device == message.device]
        messages = torch.stack([m for m, _ in fitting])
        nearest = (messages - message).abs().amax(1).argmin()
        return torch.stack([t for _, t in fitting])[nearest]


class PendingGradient(NamedTuple):
    """Of one activation, between the two passes of the backward; centre, invstd, scale (C) in the compute dtype."""

    dy: Tensor
    x: Tensor
    pivot: Tensor | None
    centre: Tensor  # mean - pivot
    invstd: Tensor  # 1 / sqrt(var + eps)
    scale: Tensor  # weight / sqrt(var + eps)
    M: float | Tensor
    sums: ops.Sums

    def input_gradient(self, total: Tensor, dot: Tensor) -> Tensor:
        """Dx = scale * (dy - mean(dy) - (x - mean) / (var + eps) * mean(dy * (x - mean))), given the global sums."""
        minus = self.scale / -at_least_one(self.M)
        slope = dot * self.invstd.square() * minus
        return ops.input_gradient(self.dy, self.x, self.pivot, self.centre, self.scale, slope, total * minus)


class Exchange:
    """The two messages of one synchronisation.

    Args:
        route: with whom.
        memory: where sums are kept for a forward that may be recomputed.
    """

    def __init__(self, route: Route, memory: Memory) -> None:
        self.route, self.memory = route, memory
        self.recomputed = memory.is_repeated()
        self.shifted: list[ops.Shifted] = []
        self.results: list[Statistics] = []
        self.reduction: Reduction | None = None
        self.gradient: list[PendingGradient] | None = None
        self.gradient_reduction: Reduction | None = None

    def launch(self, inputs: Sequence[Tensor]) -> None:
        """Sum the inputs (N, C, ...) locally and send the message."""
        sums: list[Tensor] = []
        for x in inputs:
            x_sums, shifted = ops.input_sums(ops.dense(x))
            sums += ops.about_origin(x_sums, shifted.pivot, x.numel() // x.shape[1])
            self.shifted.append(shifted)
        self.message = message_of(sums, [x.numel() // x.shape[1] for x in inputs], self.route.forward)
        if self.recomputed:
            return
        self.to_keep = self.message.clone() if may_be_recomputed() else None
        self.reduction = Reduction(self.message, self.route.group, self.route.forward)

    def receive(self) -> None:
        """Wait for the message; fills in `results`, the statistics of each input.

        Raises:
            ValueError: one value per channel in all.
        """
        totals = self.memory.recall(self.message) if self.recomputed else self._reduced()
        self.results = statistics_of(totals, [shifted.values.shape[1] for shifted in self.shifted])
        for statistics, shifted in zip(self.results, self.shifted, strict=True):
            if isinstance(statistics.M, float):  # on a device, reading M would stall it
                refuse_single_value(statistics.M, shifted.values.shape, self.route.group.size())

    def _reduced(self) -> Tensor:
        assert self.reduction is not None
        totals, self.reduction = self.reduction.wait(), None
        if self.to_keep is not None:
            self.memory.keep(self.to_keep, totals)
        return totals

    def launch_gradient(self, pending: list[PendingGradient]) -> None:
        """Send the sums of the backward."""
        message = message_of([s for p in pending for s in p.sums], [], self.route.backward)
        self.gradient, self.gradient_reduction = pending, Reduction(message, self.route.group, self.route.backward)

    def input_gradients(self, needed: Sequence[bool]) -> list[Tensor | None]:
        """Wait for the sums of the backward; dx of each input, None where not needed."""
        pending, self.gradient = self.gradient, None
        if pending is None:  # second derivatives were asked for, and computed otherwise
            return [None] * len(needed)
        reduction, self.gradient_reduction = self.gradient_reduction, None
        assert reduction is not None
        totals = reduction.wait()[:-ID_LENGTH].split([s.numel() for p in pending for s in p.sums])
        sums = zip(totals[::2], totals[1::2], strict=True)
        return [
            p.input_gradient(total, dot) if wanted else None
            for p, (total, dot), wanted in zip(pending, sums, needed, strict=True)
        ]


def refuse_single_value(M: float, shape: Sequence[int], P: int) -> None:
    """A variance needs two values; the same check on every rank, so that none is left waiting."""
    if M == 1:
        raise ValueError(
            f"expected more than 1 value per channel when training, got 1 over all ranks ({P}); this rank's input has "
            f"size {list(shape)}: give a larger batch"
        )


def message_of(sums: Sequence[Tensor], counts: Sequence[int], label: Label) -> Tensor:
    """One flat float64 message: sums, counts, id."""
    device = sums[0].device
    make = _tail if device.type == "cpu" else _tail_on_device
    return torch.cat([*sums, make((*counts, *label.signature), device)])


def statistics_of(totals: Tensor, channels: Sequence[int]) -> list[Statistics]:
    """The statistics of each input from a forward message's sums: var = E[x^2] - E[x]^2, which float64 can afford."""
    counts: Any = totals[-ID_LENGTH - len(channels) : -ID_LENGTH]
    if totals.device.type == "cpu" and not torch.compiler.is_compiling():
        counts = counts.tolist()
    statistics, start = [], 0
    for C, M in zip(channels, counts, strict=True):
        total, dot = totals[start : start + 2 * C].split(C)
        statistics.append(moments(total, dot, M))
        start += 2 * C
    return statistics


def moments(total: Tensor, dot: Tensor, M: float | Tensor, pivot: Tensor | None = None) -> Statistics:
    """The statistics of one activation from its sums (C) about a pivot (C)."""
    if pivot is not None:  # whose sum with the mean float32 would round
        total, dot = total.double(), dot.double()
    M_or_one = at_least_one(M)
    mean = total / M_or_one
    var = torch.addcmul(dot / M_or_one, mean, mean, value=-1).clamp_(min=0)
    return Statistics(mean if pivot is None else mean + pivot, var, M)


def at_least_one(M: Any) -> Any:
    """max(M, 1), so that an empty batch divides by no zero."""
    return M.clamp(min=1) if isinstance(M, Tensor) else max(M, 1.0)


def _tail(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device=device)


_tail_on_device = lru_cache(maxsize=4096)(_tail)  # copying numbers to a device stalls it: once for each message


def may_be_recomputed() -> bool:
    """Whether this forward may be inside an activation checkpoint (reentrant or not), whose backward runs it again."""
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
