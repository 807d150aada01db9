"""One synchronisation of several activations: local sums out, statistics in, and the same for the gradients.

Letters: N batch, C channels, M elements per channel over all ranks, P ranks.
The messages, float64: forward [sum x (C), sum x^2 (C)] of each activation, then the number of elements per channel of
each; backward [sum dy (C), sum dy * (x - mean) (C)] of each. Both end with the id of the layers.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from syncbn import ops
from syncbn.collectives.agreement import Message
from syncbn.collectives.channel import ID_LENGTH, Ticket, agree
from syncbn.collectives.reduction import Reduction, may_be_read
from syncbn.functional.memory import Memory, owners_of_forward
from syncbn.functional.norm import Route, Statistics, refuse_single_value
from syncbn.recomputing import Kept, keep


class Backward(NamedTuple):
    """A backward between its two nodes, where hooks of others may run: the message, and what the second pass reads.

    Tensors that are not this pass's own are kept with their version; the maps hold copies of the parameters.
    """

    reduction: Reduction
    upstream: list[ops.Upstream]
    kept: list[Kept]

    @classmethod
    def begin(cls, reduction: Reduction, upstream: list[ops.Upstream]) -> "Backward":
        """With the tensors as they are now."""
        return cls(reduction, upstream, [keep(t) for one in upstream for t in (one.x, one.dy)])

    def wait(self) -> tuple[Tensor, ops.Signature | None]:
        """The message over all ranks, as `Reduction.wait`.

        Raises:
            RuntimeError: somebody changed an input or a gradient meanwhile.
        """
        found = self.reduction.wait()
        for one in self.kept:
            one.unchanged("between the two steps of a layer's backward, its input or the gradient of its output")
        return found


class Exchange:
    """The two messages of one synchronisation.

    Args:
        route: with whom.
        memory: where sums are kept for a forward that may be recomputed.
    """

    def __init__(self, route: Route, memory: Memory) -> None:
        self.route, self.memory = route, memory
        self.owners = owners_of_forward()  # here, since our own Functions' forwards look like a checkpoint's
        self.recomputed = False
        self.given: list[Kept] = []
        self.inputs: list[Tensor] = []
        self.spans: Sequence[ops.Span | None] = []
        self.batches: list[ops.BatchSums] = []
        self.results: list[Statistics] = []
        self.reduction: Reduction | None = None
        self.to_keep: Tensor | None = None
        self.totals_to_keep: Tensor | None = None

    def launch(self, inputs: Sequence[Tensor], spans: Sequence[ops.Span | None]) -> None:
        """Sum the inputs (N, C, ...), or where there is a span its channels alone, locally and send the message."""
        self.given = [keep(x) for x in inputs]
        self.inputs = [dense_part(x, span) for x, span in zip(inputs, spans, strict=True)]
        self.spans = spans
        self.channels = [x.shape[1] for x in self.inputs]
        self.device = ops.statistics_device(inputs[0].device)
        if self.owners is not None or self.memory.may_recall():
            self.to_keep = ops.forward_message(self.inputs, (0, 0))
            self.recomputed = self.memory.is_repeated(self.to_keep)
        if not self.recomputed:
            with self._ticket("forward", len(self.inputs)) as ticket:
                if self.to_keep is None:
                    message = ops.forward_message(self.inputs, ticket.signature)
                else:
                    message = ops.message_of([self.to_keep[:-ID_LENGTH]], (), ticket.signature)
                self.reduction = Reduction(message, ticket)

    def receive(self) -> None:
        """Wait for the message; fills in `batches`, the sums of each input over all ranks.

        Raises:
            RuntimeError: an input was changed in place since it was summed.
            ValueError: one value per channel in all (on a CPU; elsewhere kernels make the outputs NaN, since reading
                the number would stall the device).
        """
        totals, signature = self._reduced()
        for one in self.given:
            one.unchanged("between start_sync_batch_norm() and finish(), an input")
        self.given = []
        self.batches = batches_of(totals, signature, self.channels)
        for batch, x in zip(self.batches, self.inputs, strict=True):
            if not isinstance(batch.M, Tensor):
                refuse_single_value(batch.M, x.shape, self.route.group.size())

    def remember(self, outputs: Sequence[Tensor]) -> None:
        """Keep the sums for a repetition of the forward that has these outputs, if there may be one."""
        if self.totals_to_keep is not None:
            assert self.to_keep is not None and self.owners is not None
            self.memory.keep(self.to_keep, self.totals_to_keep, self.owners, outputs[0].grad_fn)
        self.to_keep = self.totals_to_keep = self.owners = None

    def launch_gradient(self, upstream: list[ops.Upstream]) -> tuple[list[tuple[ops.Upstream, ops.Gradient]], Backward]:
        """Send the sums of the backward; returns what `ops.backward_sums` does for each, and what comes next."""
        with self._ticket("backward", 0) as ticket:
            found, message = ops.backward_sums(upstream, ticket.signature)
            return found, Backward.begin(Reduction(message, ticket), [one for one, _ in found])

    def input_gradients(self, backward: Backward, needed: Sequence[bool]) -> list[Tensor | None]:
        """Wait for the sums of the backward; dx of each input as `gradients_of_inputs` returns them."""
        totals, signature = backward.wait()
        sums = totals[:-ID_LENGTH].split([2 * C for C in self.channels])
        Ms = [statistics.M for statistics in self.results]
        return gradients_of_inputs(backward.upstream, self.spans, sums, Ms, needed, signature)

    def _ticket(self, direction: str, counts: int) -> Ticket:
        group, layers, layers_built = self.route
        length = int(sum(2 * C for C in self.channels)) + counts + ID_LENGTH
        return agree(group, Message(direction, layers, length), self.device, layers_built)

    def _reduced(self) -> tuple[Tensor, ops.Signature | None]:
        if self.reduction is None:
            assert self.to_keep is not None
            return self.memory.recall(self.to_keep), None
        (totals, signature), self.reduction = self.reduction.wait(), None
        if self.owners is not None:
            totals = self.totals_to_keep = totals if signature is None else signature.poisoned(totals)
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


def batches_of(totals: Tensor, signature: ops.Signature | None, channels: Sequence[int]) -> list[ops.BatchSums]:
    """A forward message's sums over all ranks, by input."""
    counts: Any = totals[-ID_LENGTH - len(channels) : -ID_LENGTH]
    if may_be_read(totals):
        counts = counts.tolist()
    sums = totals[: -ID_LENGTH - len(channels)].split([2 * C for C in channels])
    return [ops.BatchSums(own, M, signature) for own, M in zip(sums, counts, strict=True)]
