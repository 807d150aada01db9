"""Which implementation normalizes, and when.

| | over ranks | this rank alone |
|---|---|---|
| torch.compile traces | `compiled` | `compiled` |
| torch.export, torch.func, forward-mode AD, tensors that see every operator | `composed` | `composed` |
| else | `fused`, in two halves | `fused`, in one |
"""

from collections.abc import Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from syncbn import ops
from syncbn.functional.compiled import CompiledStarted, is_traced
from syncbn.functional.composed import composed
from syncbn.functional.fused import FusedStarted, batch_norm, start
from syncbn.functional.memory import Memory, Owner, owners_of_forward
from syncbn.functional.norm import Norm, Route, Statistics, only_operators
from syncbn.recomputing import unseen_by_selective_checkpoints


class Normalized(NamedTuple):
    """The result of a normalization.

    repeated: whether this was an activation checkpoint's second forward, after which nothing may be updated again.
    updated: of each norm, whether its moving averages were updated in the pass.
    """

    outputs: list[Tensor]
    statistics: list[Statistics]
    repeated: bool
    updated: list[bool]


class Normalization:
    """A normalization of several activations under way.

    Args:
        inputs: (N, C, ...) each.
        spans: of each input, the channels that are meant; None for all.
        tensors: the inputs and parameters, which may ask for an implementation.
        route: over which ranks; None for this one alone.
        memory: where sums are kept for a forward that may be recomputed.
    """

    def __init__(
        self,
        inputs: Sequence[Tensor],
        spans: Sequence[ops.Span | None],
        tensors: Sequence[Tensor | None],
        route: Route | None,
        memory: Memory,
    ) -> None:
        self.tensors, self.route, self.memory = tensors, route, memory
        self.started: FusedStarted | CompiledStarted | None = None
        if not inputs:
            return
        if is_traced():
            self.started = CompiledStarted(inputs, route)
        elif route is not None and not only_operators(tensors):
            with unseen_by_selective_checkpoints():
                self.started = start(inputs, route, memory, spans)

    def finish(self, norms: Sequence[Norm], running: Sequence[ops.Running | None]) -> Normalized:
        """Wait for the message, if there is one, and normalize.

        Args:
            norms: of each input.
            running: of each, the moving averages that the pass may update.
        """
        if self.started is not None:
            return self._finish_started(self.started, norms, running)
        if only_operators([*self.tensors, *(norm.tensors.residual for norm in norms)]):
            outputs, statistics = composed(norms, self.route)
            return Normalized(outputs, [s.detach() for s in statistics], False, [False] * len(norms))
        return self._alone(norms, running)

    def _finish_started(
        self, started: FusedStarted | CompiledStarted, norms: Sequence[Norm], running: Sequence[ops.Running | None]
    ) -> Normalized:
        repeated = started.recomputed
        if not repeated:
            norms = _updating(norms, running)
        return Normalized(*started.finish(norms), repeated, _updates(norms))

    def _alone(self, norms: Sequence[Norm], running: Sequence[ops.Running | None]) -> Normalized:
        owners = owners_of_forward()
        may_repeat = owners is not None or self.memory.may_recall()
        if not may_repeat:
            norms = _updating(norms, running)
        outputs, statistics = list[Tensor](), list[Statistics]()
        for _, of_one_input in groupby(norms, key=_input_of):
            ys, found = batch_norm(list(of_one_input))
            outputs += ys
            statistics += found
        repeated = may_repeat and self._repeats(statistics, owners, outputs)
        return Normalized(outputs, statistics, repeated, _updates(norms))

    def _repeats(self, statistics: list[Statistics], owners: list[Owner] | None, outputs: list[Tensor]) -> bool:
        """Whether a forward without messages is an activation checkpoint's second; of a first one, takes note."""
        if not statistics:
            return False
        note = torch.cat([part for mean, var, _ in statistics for part in (mean, var)])
        repeated = self.memory.is_repeated(note)
        if not repeated and owners is not None:
            self.memory.keep(note, note, owners, outputs[0].grad_fn)
        return repeated


def _input_of(norm: Norm) -> int:
    """Spans of one input are normalized together."""
    return id(norm if norm.settings.span is None else norm.tensors.x)


def _updating(norms: Sequence[Norm], running: Sequence[ops.Running | None]) -> list[Norm]:
    """The norms, to update moving averages in the pass that normalizes."""
    pairs = zip(norms, running, strict=True)
    return [norm if r is None else norm._replace(settings=norm.settings._replace(running=r)) for norm, r in pairs]


def _updates(norms: Sequence[Norm]) -> list[bool]:
    return [norm.settings.running is not None for norm in norms]
