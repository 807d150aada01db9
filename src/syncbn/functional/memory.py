"""The sums of forwards that an activation checkpoint may run again, kept until it no longer can.

A checkpoint drops the activations of a forward and runs that forward again in the backward. The second run must neither
reduce nor update moving averages: it takes the sums of the first. There are two kinds of checkpoint:

- Non-reentrant: saved-tensor hooks. The forward can be repeated as long as a tensor waits that they packed, that is as
  long as the hooks live.
- Reentrant: an autograd node whose forward runs the layers without gradients (torch's, DeepSpeed's, fairscale's). The
  forward can be repeated as long as that node lives and its buffers were not freed.

A plain forward without gradients can never be repeated: `torch.no_grad` leaves forward-mode AD enabled, while the
forward of an autograd node disables both.
"""

import sys
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor
from torch.autograd import Variable
from torch.autograd.function import BackwardCFunction

from syncbn.recomputing import hooks_of_others, unpack_hooks_of_others

Owner: TypeAlias = BackwardCFunction | Callable[..., Any]  # a reentrant checkpoint's node, or an unpack hook


def owners_of_forward() -> list[Owner] | None:
    """Who may run the forward under way again in a backward; none at all where somebody unknown may.

    Returns:
        None where nobody may.
    """
    owners: list[Owner] = []
    if hooks_of_others():
        owners += unpack_hooks_of_others()
    if not torch._C._is_fwd_grad_enabled():
        owners += _nodes_in_forward()
        if not owners and not torch.is_inference_mode_enabled():
            return []
    return owners or None


class Memory:
    """A layer's messages and their sums over the ranks, of forwards that may be repeated.

    A repetition is recognised by its local sums: the message nearest to them is the one it repeats; of several the
    same, the one repeated least and latest, since a backward goes from the end.

    Of C channels over several ranks a forward takes 16 * (2C + 3) bytes, alone 16 * C. It is dropped with the last of
    its owners. At most 16 are kept without a graph of their own to go with: those of hooks that live on, such as
    hooks that offload activations throughout the training, and those of an owner that cannot be seen.
    """

    MOST_WITHOUT_GRAPH = 16

    def __init__(self) -> None:
        self._by_owner: WeakKeyDictionary[Owner, list[_Forward]] = WeakKeyDictionary()
        self._of_unknown: deque[_Forward] = deque()

    def __deepcopy__(self, memo: object) -> "Memory":
        return Memory()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Memory, ()

    def may_recall(self) -> bool:
        """Whether the forward under way may be a repetition: it runs in a backward, and others are kept."""
        return torch._C._current_graph_task_id() != -1 and bool(self._forwards())

    def keep(self, message: Tensor, totals: Tensor, owners: Sequence[Owner], node: Any) -> None:
        """Remember what `message` was summed up to.

        Args:
            message: this rank's.
            totals: of all ranks.
            owners: as `owners_of_forward` returned them.
            node: the layer's own in the graph, None where it has none.
        """
        self._drop_freed()
        forward = _Forward(message, totals, node)
        known = [owner for owner in owners if _can_be_watched(owner)]
        for owner in known:
            kept = self._by_owner.setdefault(owner, [])
            kept.append(forward)
            if not isinstance(owner, BackwardCFunction):
                without_graph = [one for one in kept if not one.has_graph()]
                for one in without_graph[: -self.MOST_WITHOUT_GRAPH]:
                    kept.remove(one)
        if not known:
            self._keep_of_unknown(forward)

    def is_repeated(self, message: Tensor) -> bool:
        """Whether the forward with these local sums repeats a remembered one."""
        if not self.may_recall():
            return False
        fitting = self._fitting(message)
        # Elsewhere than on a CPU comparing would stall the device.
        repeated = bool(fitting) and (
            message.device.type != "cpu" or bool(_distances(fitting, message).min() <= 1e-3 * message.abs().max())
        )
        if repeated:
            Variable._execution_engine.queue_callback(self._drop_freed)  # at the end of this backward
        return repeated

    def recall(self, message: Tensor) -> Tensor:
        """The sums that went with `message`, found without reading a value on the host."""
        fitting = self._fitting(message)
        distances = _distances(fitting, message)
        latest_last = torch.arange(len(fitting) - 1, -1, -1, device=message.device)
        uses = torch.stack([one.uses for one in fitting])
        order = uses * len(fitting) + latest_last
        found = order.masked_fill(distances > distances.min(), float("inf")).argmin(keepdim=True)
        for one, used in zip(fitting, uses.index_add(0, found, uses.new_ones(1)).unbind(), strict=True):
            one.uses = used
        return torch.stack([one.totals for one in fitting])[found][0]

    def _forwards(self) -> list["_Forward"]:
        """All that may be repeated now, the latest last; of the node that runs where it repeats its own."""
        node = torch._C._current_autograd_node()
        if isinstance(node, BackwardCFunction) and node in self._by_owner:
            return self._by_owner[node]
        self._drop_freed()
        found = {id(one): one for kept in [*self._by_owner.values(), self._of_unknown] for one in kept}
        return sorted(found.values(), key=lambda one: one.number)

    def _drop_freed(self) -> None:
        for owner in [owner for owner in self._by_owner if _is_freed(owner)]:
            del self._by_owner[owner]

    def _fitting(self, message: Tensor) -> list["_Forward"]:
        return [one for one in self._forwards() if one.fits(message)]

    def _keep_of_unknown(self, forward: "_Forward") -> None:
        if len(self._of_unknown) == self.MOST_WITHOUT_GRAPH:
            self._of_unknown.popleft()
            warnings.warn(
                f"a BatchNorm layer ran more than {self.MOST_WITHOUT_GRAPH} times without gradients inside an "
                "autograd.Function whose ctx is out of sight; if that is an activation checkpoint, its backward will "
                "synchronise the first of these forwards again: use torch.utils.checkpoint",
                stacklevel=2,
            )
        self._of_unknown.append(forward)


class _Forward:
    """One that is kept."""

    _built = 0

    def __init__(self, message: Tensor, totals: Tensor, node: Any) -> None:
        self.message, self.totals = message, totals
        self.uses = message.new_zeros(())
        self._node = None if node is None else ref(node)
        _Forward._built += 1
        self.number = _Forward._built

    def has_graph(self) -> bool:
        """Whether the layer's own node waits for its backward."""
        node = None if self._node is None else self._node()
        return node is not None and not _is_freed(node)

    def fits(self, message: Tensor) -> bool:
        """Whether the other could be the same message."""
        mine = self.message
        return mine.shape == message.shape and mine.device == message.device and mine.dtype == message.dtype


def _distances(forwards: Sequence[_Forward], message: Tensor) -> Tensor:
    return (torch.stack([one.message for one in forwards]) - message).abs().amax(1)


def _is_freed(owner: Any) -> bool:
    """Whether it is a node whose backward has run and did not keep the graph."""
    if not isinstance(owner, BackwardCFunction):
        return False
    try:
        return owner._raw_saved_tensors is None  # which unpacks nothing
    except RuntimeError:
        return True


def _can_be_watched(owner: Owner) -> bool:
    try:
        hash(owner), ref(owner)
    except TypeError:
        return False
    return True


def _nodes_in_forward() -> list[Owner]:
    """The autograd nodes inside whose forward the code runs: its first argument, as a rule called ctx."""
    found: list[Owner] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount and code.co_varnames[0] != "self":
            ctx = frame.f_locals.get(code.co_varnames[0])
            found += [ctx] if isinstance(ctx, BackwardCFunction) else []
        frame = frame.f_back
    return found
