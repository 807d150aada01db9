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
from syncbn.agreement import LayerName, Message
from syncbn.distributed import ID_LENGTH, Reduction, agree


class Statistics(NamedTuple):
    """Of one activation: mean and biased variance (C), float64, and M."""

    mean: Tensor
    var: Tensor
    M: float | Tensor

    def detach(self) -> "Statistics":
        """The same without a gradient."""
        return Statistics(*(s.detach() if isinstance(s, Tensor) else s for s in self))  # type: ignore[arg-type]

    @property
    def unbiased_var(self) -> Tensor:
        """Var * M / (M - 1), (C)."""
        return self.var * (self.M / ops.at_least_one(self.M - 1))


class Route(NamedTuple):
    """Whom an exchange is with, which layers it is of, and how many layers this process has built so far."""

    group: dist.ProcessGroup
    layers: tuple[LayerName, ...]
    layers_built: int


class Memory:
    """A layer's messages and their sums, kept so that activation checkpointing's recomputed forward reduces nothing.

    A recomputation runs inside a backward, and is recognised by its local sums: the message nearest to them is the one
    it repeats; of several the same, the one repeated least and latest, since a backward goes from the end.
    """

    _MOST = 128

    def __init__(self) -> None:
        self.entries: deque[tuple[Tensor, Tensor]] = deque()
        self.uses = torch.zeros(0)
        self.recalls = 0

    def __deepcopy__(self, memo: object) -> "Memory":
        return Memory()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Memory, ()

    def keep(self, message: Tensor, totals: Tensor) -> None:
        """Remember what `message` was summed up to; forget what was repeated, and the oldest where it gets too much."""
        if self.entries and (self.recalls >= len(self.entries) or not self._fits(message)):
            self.forget()
        if len(self.entries) >= self._MOST:
            self.entries.popleft()
        kept = len(self.entries)
        self.uses = torch.cat([self.uses[len(self.uses) - kept :].to(message.device), message.new_zeros(1)])
        self.entries.append((message, totals))

    def forget(self) -> None:
        """Drop everything."""
        self.entries.clear()
        self.recalls = 0

    def is_repeated(self, message: Tensor) -> bool:
        """Whether the forward with these local sums repeats a remembered one."""
        if not self.entries or torch._C._current_graph_task_id() == -1 or not self._fits(message):
            return False
        if message.device.type != "cpu":  # comparing would stall the device
            return True
        return bool(self._distances(message).min() <= 1e-3 * message.abs().max())

    def recall(self, message: Tensor) -> Tensor:
        """The sums that went with `message`, found without reading a value on the host."""
        distances = self._distances(message)
        latest_last = torch.arange(len(self.entries) - 1, -1, -1, device=message.device)
        order = self.uses * len(self.entries) + latest_last
        found = order.masked_fill(distances > distances.min(), float("inf")).argmin(keepdim=True)
        self.uses.index_add_(0, found, self.uses.new_ones(1))
        self.recalls += 1
        return torch.stack([totals for _, totals in self.entries])[found][0]

    def _fits(self, message: Tensor) -> bool:
        kept = self.entries[-1][0]
        return kept.shape == message.shape and kept.device == message.device and kept.dtype == message.dtype

    def _distances(self, message: Tensor) -> Tensor:
        return (torch.stack([m for m, _ in self.entries]) - message).abs().amax(1)


class PendingGradient(NamedTuple):
    """Of one activation, between the two passes of the backward; sums (2C) are this rank's."""

    dy: Tensor
    x: Tensor
    affine: ops.Affine
    M: float | Tensor
    sums: Tensor

    def input_gradient(self, sums: Tensor) -> Tensor:
        """Dx, given the sums over all ranks."""
        return ops.input_gradient(self.dy, self.x, self.affine, sums, ops.at_least_one(self.M))


class Exchange:
    """The two messages of one synchronisation.

    Args:
        route: with whom.
        memory: where sums are kept for a forward that may be recomputed.
    """

    def __init__(self, route: Route, memory: Memory) -> None:
        self.route, self.memory = route, memory
        self.recomputed = False
        self.inputs: list[Tensor] = []
        self.results: list[Statistics] = []
        self.reduction: Reduction | None = None
        self.gradient: list[PendingGradient] | None = None
        self.gradient_reduction: Reduction | None = None

    def launch(self, inputs: Sequence[Tensor]) -> None:
        """Sum the inputs (N, C, ...) locally and send the message."""
        self.inputs = [ops.dense(x) for x in inputs]
        sums = [ops.input_sums(x) for x in self.inputs]
        counts = [x.numel() // x.shape[1] for x in inputs]
        self.to_keep: Tensor | None = None
        if may_be_recomputed() or self.memory.entries:
            self.to_keep = message_of(sums, counts, (0, 0))
            self.recomputed = self.memory.is_repeated(self.to_keep)
        if not self.recomputed:
            self.reduction = self._send("forward", sums, counts)

    def receive(self) -> None:
        """Wait for the message; fills in `results`, the statistics of each input.

        Raises:
            ValueError: one value per channel in all.
        """
        totals = self._reduced()
        self.results = statistics_of(totals, [x.shape[1] for x in self.inputs])
        for statistics, x in zip(self.results, self.inputs, strict=True):
            if x.numel() <= x.shape[1]:  # as on every rank if there is one value in all; reading M may stall
                refuse_single_value(float(statistics.M), x.shape, self.route.group.size())

    def launch_gradient(self, pending: list[PendingGradient]) -> None:
        """Send the sums of the backward."""
        self.gradient = pending
        self.gradient_reduction = self._send("backward", [p.sums for p in pending], [])

    def input_gradients(self, needed: Sequence[bool]) -> list[Tensor | None]:
        """Wait for the sums of the backward; dx of each input, None where not needed."""
        pending, self.gradient = self.gradient, None
        if pending is None:  # second derivatives were asked for, and computed otherwise
            return [None] * len(needed)
        reduction, self.gradient_reduction = self.gradient_reduction, None
        assert reduction is not None
        totals = reduction.wait()[:-ID_LENGTH].split([p.sums.numel() for p in pending])
        return [
            p.input_gradient(sums) if wanted else None for p, sums, wanted in zip(pending, totals, needed, strict=True)
        ]

    def _send(self, direction: str, sums: list[Tensor], counts: list[int]) -> Reduction:
        group, layers, layers_built = self.route
        length = sum(s.numel() for s in sums) + len(counts) + ID_LENGTH
        ticket = agree(group, Message(direction, layers, length), sums[0].device, layers_built)
        return Reduction(message_of(sums, counts, ticket.signature), ticket)

    def _reduced(self) -> Tensor:
        if self.reduction is None:
            assert self.to_keep is not None
            return self.memory.recall(self.to_keep)
        totals, self.reduction = self.reduction.wait(), None
        if self.to_keep is not None and may_be_recomputed():
            self.memory.keep(self.to_keep, totals)
        return totals


def refuse_single_value(M: float, shape: Sequence[int], P: int) -> None:
    """A variance needs two values; the same check on every rank, so that none is left waiting."""
    if M == 1:
        raise ValueError(
            f"expected more than 1 value per channel when training, got 1 over all ranks ({P}); this rank's input has "
            f"size {list(shape)}: give a larger batch"
        )


def message_of(sums: Sequence[Tensor], counts: Sequence[int], signature: tuple[int, int]) -> Tensor:
    """One flat float64 message: sums, counts, id and its square."""
    device = sums[0].device
    make = _tail if device.type == "cpu" else _tail_on_device
    return torch.cat([*sums, make((*counts, *signature), device)])


def statistics_of(totals: Tensor, channels: Sequence[int]) -> list[Statistics]:
    """The statistics of each input from a forward message's sums: var = E[x^2] - E[x]^2, which float64 can afford."""
    counts: Any = totals[-ID_LENGTH - len(channels) : -ID_LENGTH]
    if totals.device.type == "cpu" and not torch.compiler.is_compiling():
        counts = counts.tolist()
    statistics, start = [], 0
    for C, M in zip(channels, counts, strict=True):
        total, dot = totals[start : start + 2 * C].split(C)
        statistics.append(Statistics(*ops.moments_of(ops.Sums(total, dot), None, M), M))
        start += 2 * C
    return statistics


def _tail(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float64, device=device)


_tail_on_device = lru_cache(maxsize=4096)(_tail)  # copying numbers to a device stalls it: once for each message


def may_be_recomputed() -> bool:
    """Whether this forward may be inside an activation checkpoint (reentrant or not), whose backward runs it again."""
    return not torch.is_grad_enabled() or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
