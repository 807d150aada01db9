"""Counts the bytes of all tensors alive, on a device that does not count them itself."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

MEBIBYTE = 2**20


class LiveTensors(TorchDispatchMode):
    """Counts, within its context, the bytes of what operators return for as long as it lives.

    Attributes:
        course: bytes after each operator, less what was let go before the next.
    """

    def __init__(self) -> None:
        super().__init__()
        self.course = [0]
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operator; take note of new memory."""
        result = func(*args, **(kwargs or {}))
        new = sum(self._watch(t) for t in tree_iter(result) if isinstance(t, Tensor))
        self.course.append(self.course[-1] + new)
        return result

    def _watch(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._sizes:
            return 0
        self._sizes[key] = storage.nbytes()
        weakref.finalize(storage, self._forget, key)
        return storage.nbytes()

    def _forget(self, key: int) -> None:
        self.course[-1] -= self._sizes.pop(key)


def live_bytes(make: Callable[[], Callable[[], Any]]) -> list[int]:
    """The course over a step of the bytes of all tensors alive, parameters and optimiser among them.

    Args:
        make: builds what the step needs, and returns the step.
    """
    gc.collect()
    with LiveTensors() as live:
        step = make()
        step()  # after which the optimiser has its state
        start = len(live.course) - 1
        step()
    return live.course[start:]
