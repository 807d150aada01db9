"""One synchronisation of several activations: local sums out, statistics in, and the same for the gradients.

Letters: N batch, C channels, M elements per channel over all ranks, P ranks.
The messages, float64: forward [sum x (C), sum x^2 (C)] of each activation, then the number of elements per channel of
each; backward [sum dy (C), sum dy * (x - mean) (C)] of each. Both end with the id of the layers.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn import ops
from syncbn.agreement import LayerName, Message
from syncbn.distributed import ID_LENGTH, Reduction, Ticket, agree, may_be_read
from syncbn.recomputing import hooks_of_others


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


class Exchange:
    """The two messages of one synchronisation.

    Args:
        route: with whom.
        memory: where sums are kept for a forward that may be recomputed.
    """

    def __init__(self, route: Route, memory: Memory) -> None:
        self.route, self.memory = route, memory
        self.may_be_recomputed = may_be_recomputed()  # here, since inside a Function's forward no gradients are enabled
        self.recomputed = False
        self.inputs: list[Tensor] = []
        self.spans: Sequence[ops.Span | None] = []
        self.batches: list[ops.BatchSums] = []
        self.results: list[Statistics] = []
        self.reduction: Reduction | None = None
        self.to_keep: Tensor | None = None
        self.upstream: list[ops.Upstream] | None = None
        self.gradient_reduction: Reduction | None = None

    def launch(self, inputs: Sequence[Tensor], spans: Sequence[ops.Span | None]) -> None:
        """Sum the inputs (N, C, ...), or where there is a span its channels alone, locally and send the message."""
        self.inputs = [dense_part(x, span) for x, span in zip(inputs, spans, strict=True)]
        self.spans = spans
        self.channels = [x.shape[1] for x in self.inputs]
        self.device = ops.statistics_device(inputs[0].device)
        if self.may_be_recomputed or self.memory.entries:
            self.to_keep = ops.forward_message(self.inputs, (0, 0))
            self.recomputed = self.memory.is_repeated(self.to_keep)
        if not self.recomputed:
            ticket = self._ticket("forward", len(self.inputs))
            if self.to_keep is None:
                message = ops.forward_message(self.inputs, ticket.signature)
            else:
                message = ops.message_of([self.to_keep[:-ID_LENGTH]], (), ticket.signature)
            self.reduction = Reduction(message, ticket)

    def receive(self) -> None:
        """Wait for the message; fills in `batches`, the sums of each input over all ranks.

        Raises:
            ValueError: one value per channel in all (on a CPU; elsewhere kernels make the outputs NaN, since reading
                the number would stall the device).
        """
        totals, signature = self._reduced()
        self.batches = batches_of(totals, signature, self.channels)
        for batch, x in zip(self.batches, self.inputs, strict=True):
            if not isinstance(batch.M, Tensor):
                refuse_single_value(batch.M, x.shape, self.route.group.size())

    def launch_gradient(self, upstream: list[ops.Upstream]) -> list[tuple[ops.Upstream, ops.Gradient]]:
        """Send the sums of the backward; returns what `ops.backward_sums` does for each."""
        ticket = self._ticket("backward", 0)
        found, message = ops.backward_sums(upstream, ticket.signature)
        self.upstream = [one for one, _ in found]
        self.gradient_reduction = Reduction(message, ticket)
        return found

    def input_gradients(self, needed: Sequence[bool]) -> list[Tensor | None]:
        """Wait for the sums of the backward; dx of each input as `gradients_of_inputs` returns them."""
        upstream, self.upstream = self.upstream, None
        if upstream is None:  # second derivatives were asked for, and computed otherwise
            return [None] * len(needed)
        reduction, self.gradient_reduction = self.gradient_reduction, None
        assert reduction is not None
        totals, signature = reduction.wait()
        sums = totals[:-ID_LENGTH].split([2 * one.x.shape[1] for one in upstream])
        Ms = [statistics.M for statistics in self.results]
        return gradients_of_inputs(upstream, self.spans, sums, Ms, needed, signature)

    def _ticket(self, direction: str, counts: int) -> Ticket:
        group, layers, layers_built = self.route
        length = sum(2 * C for C in self.channels) + counts + ID_LENGTH
        return agree(group, Message(direction, layers, length), self.device, layers_built)

    def _reduced(self) -> tuple[Tensor, ops.Signature | None]:
        if self.reduction is None:
            assert self.to_keep is not None
            return self.memory.recall(self.to_keep), None
        (totals, signature), self.reduction = self.reduction.wait(), None
        if self.to_keep is not None and self.may_be_recomputed:
            totals = totals if signature is None else signature.poisoned(totals)
            self.memory.keep(self.to_keep, totals)
        return totals, signature


def dense_part(x: Tensor, span: ops.Span | None) -> Tensor:
    """What the passes process of an input x."""
    x = ops.dense(x)
    return x if span is None else span.of(x)


def gradients_of_inputs(
    upstream: Sequence[ops.Upstream],
    spans: Sequence[ops.Span | None],
    sums: Sequence[Tensor],
    Ms: Sequence[float | Tensor],
    needed: Sequence[bool],
    signature: ops.Signature | None = None,
) -> list[Tensor | None]:
    """Dx of each input, None where not needed. Spans of one input follow each other, and the first gets all of it."""
    found: list[Tensor | None] = []
    whole: Tensor | None = None
    for (dy, x, affine, _), span, own, M, wanted in zip(upstream, spans, sums, Ms, needed, strict=True):
        if not wanted:
            found.append(None)
        elif span is None:
            found.append(ops.input_gradient(dy, x, affine, own, M, signature))
        else:
            if whole is None or span.first == 0:
                whole = span.whole_like(x)
                found.append(whole)
            else:
                found.append(None)
            ops.input_gradient(dy, x, affine, own, M, signature, into=span.of(whole))
    return found


def refuse_single_value(M: float, shape: Sequence[int], P: int) -> None:
    """A variance needs two values; the same check on every rank, so that none is left waiting."""
    if M == 1:
        raise ValueError(
            f"expected more than 1 value per channel when training, got 1 over all ranks ({P}); this rank's input has "
            f"size {list(shape)}: give a larger batch"
        )


def batches_of(totals: Tensor, signature: ops.Signature | None, channels: Sequence[int]) -> list[ops.BatchSums]:
    """A forward message's sums over all ranks, by input."""
    counts: Any = totals[-ID_LENGTH - len(channels) : -ID_LENGTH]
    if may_be_read(totals):
        counts = counts.tolist()
    sums = totals[: -ID_LENGTH - len(channels)].split([2 * C for C in channels])
    return [ops.BatchSums(own, M, signature) for own, M in zip(sums, counts, strict=True)]


def may_be_recomputed() -> bool:
    """Whether this forward may be inside an activation checkpoint (reentrant or not), whose backward runs it again."""
    return not torch.is_grad_enabled() or hooks_of_others()
