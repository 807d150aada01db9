"""Watches what goes over the wire: every collective that passes PyTorch's dispatcher, whichever function called it."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_LOCAL = ("wait_tensor", "monitored_barrier_wait")


class Traffic(TorchDispatchMode):
    """Records (operator, bytes) of each collective inside the `with` block, backward included."""

    def __init__(self):
        super().__init__()
        self.sent = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in ("c10d", "_c10d_functional") and not any(name in str(func) for name in _LOCAL):
            self.sent.append((str(func.overloadpacket).split(".")[-1].rstrip("_"), size_of(args)))
        return func(*args, **(kwargs or {}))

    @property
    def count(self):
        return len(self.sent)

    @property
    def bytes(self):
        return sum(size for _, size in self.sent)


def size_of(args):
    tensors = [t for a in args for t in (a if isinstance(a, (list, tuple)) else [a]) if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)
