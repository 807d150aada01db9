"""What stands in for a network's tensors while it is traced, and what a trace must leave as it was."""

import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree


def fakes_of(arguments: Sequence[Any], options: Mapping[str, Any]) -> tuple[list[Any], pytree.TreeSpec]:
    """The leaves of a call's arguments, with fakes for tensors, and how they are nested."""
    leaves, spec = pytree.tree_flatten((tuple(arguments), dict(options)))
    return [fake_like(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec


def random_states() -> tuple[Any, ...]:
    """States of the random generators of Python and NumPy, to be compared."""
    numpy = sys.modules.get("numpy")
    drawn = None if numpy is None else numpy.random.get_state(legacy=False)["state"]
    return random.getstate(), None if drawn is None else (drawn["pos"], int(drawn["key"][0]), int(drawn["key"][-1]))


@contextmanager
def python_random_kept() -> Iterator[None]:
    """Afterwards the generators of Python and NumPy are what they were."""
    numpy, state = sys.modules.get("numpy"), random.getstate()
    of_numpy = None if numpy is None else numpy.random.get_state()
    try:
        yield
    finally:
        random.setstate(state)
        if numpy is not None:
            numpy.random.set_state(of_numpy)


def context_of_thread() -> tuple[Any, ...]:
    """The modes of torch that decide what an operator does."""
    devices = ("cpu", "cuda")
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch._C._autograd._top_saved_tensors_default_hooks(False),
        *(torch.is_autocast_enabled(device) for device in devices),
        *(torch.get_autocast_dtype(device) for device in devices),
    )


def fake_like(x: Tensor) -> Tensor:
    """A tensor of the size, strides, dtype and device of x, made under a fake mode."""
    fake = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return fake.requires_grad_(x.requires_grad)


@contextmanager
def fake_state(network: nn.Module, mode: FakeTensorMode) -> Iterator[None]:
    """Parameters and buffers are fake for now; afterwards the modules' attributes are what they were."""
    fakes: dict[int, Tensor] = {}
    kept: list[tuple[Any, Any]] = []
    try:
        for module in network.modules():
            lists = [value for value in module.__dict__.values() if isinstance(value, list)]
            kept += [(one, list(one)) for one in lists]
            states: list[Any] = [module.__dict__, module._parameters, module._buffers, module._modules]
            kept += [(state, dict(state)) for state in states]
            for state in states[1:3]:
                for name, t in state.items():
                    if t is not None:
                        fakes.setdefault(id(t), t if isinstance(t, FakeTensor) else mode.from_tensor(t))
                        state[name] = fakes[id(t)]
        yield
    finally:
        for state, real in kept:
            state.clear()
            (state.extend if isinstance(state, list) else state.update)(real)
