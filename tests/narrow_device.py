"""A pretended device without float64: it calls itself mps, computes on the CPU, and refuses what such a device does.

Tensors on it are wrappers around tensors of the CPU. Everything that an operator does with one passes through
`_on_device`, which refuses a float64 result there, and tensors of both devices in one operator. It stands for how
dtypes and devices are used; how a real device rounds, and which operators it has, is not known from it.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from syncbn.functional import compiled
from syncbn.ops import common

DEVICE = torch.device("mps:0")
_HERE = (DEVICE, torch.device("meta"))  # as autograd's nodes know it, see NarrowTensor
_BETWEEN_DEVICES = (torch.ops.aten.copy_, torch.ops.aten._to_copy, torch.ops.aten.to)
_OWN_OPERATORS = {op._opoverload: op._init_fn for op in (compiled.forward_message, compiled.backward_sums)}


class NarrowTensor(Tensor):
    """A tensor on the device, whose elements are those of `held`."""

    @staticmethod
    def __new__(cls, held):
        # For autograd's C++ it is a meta tensor, since there is no such device.
        options = {"strides": held.stride(), "dtype": held.dtype, "device": "meta"}
        return Tensor._make_wrapper_subclass(cls, held.shape, **options)

    def __init__(self, held):
        self.held = held

    device = property(lambda self: DEVICE)
    is_cpu = property(lambda self: False)
    is_meta = property(lambda self: False)

    def __repr__(self):
        return f"NarrowTensor({self.held})"

    @classmethod
    def __torch_dispatch__(cls, operator, types, arguments=(), options=None):
        return _on_device(operator, arguments, options or {})


common._KEEP_NOTHING_BACK.add(NarrowTensor)  # a tensor on a device, not one that has to see every operator


class NarrowDevice(TorchDispatchMode):
    """Within, the device is there for functions that make tensors."""

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        options = options or {}
        tensors = [t for t in tree_flatten((arguments, options))[0] if isinstance(t, Tensor)]
        here = any(isinstance(t, NarrowTensor) for t in tensors) or options.get("device") in _HERE
        return _on_device(operator, arguments, options) if here else operator(*arguments, **options)


def _on_device(operator, arguments, options):
    if operator in _OWN_OPERATORS:  # they call passes, which have to see where tensors are
        with NarrowDevice():
            return _OWN_OPERATORS[operator](*arguments, **options)
    leaves, structure = tree_flatten((arguments, options))
    tensors = [t for t in leaves if isinstance(t, Tensor)]
    if operator.overloadpacket not in _BETWEEN_DEVICES and any(
        type(t) is Tensor or type(t) is torch.nn.Parameter for t in tensors
    ):
        raise RuntimeError(f"{operator}: expected all tensors to be on the same device, found mps and cpu")
    target = options.get("device")
    to_host = target is not None and target not in _HERE
    plain = [t.held if isinstance(t, NarrowTensor) else t for t in leaves]
    plain_arguments, plain_options = tree_unflatten(plain, structure)
    if target is not None:
        plain_options["device"] = torch.device("cpu")
    if operator is torch.ops.aten.copy_.default and arguments[0].dtype != arguments[1].dtype:
        assert isinstance(arguments[1], NarrowTensor) or arguments[1].dtype != torch.float64, "moved as float64"
    result = operator(*plain_arguments, **plain_options)
    return result if to_host else tree_map_only(Tensor, lambda t: _wrapped(operator, t, tensors), result)


def _wrapped(operator, result, tensors):
    if result.dtype in (torch.float64, torch.complex128):
        raise TypeError(f"{operator}: a float64 result on a device that has no float64")
    for t in tensors:  # what an operator in place returns
        if isinstance(t, NarrowTensor) and t.held is result:
            return t
    return NarrowTensor(result)


def on_device(t, requires_grad=False):
    """A copy of t there."""
    return t.detach().clone().to(DEVICE).requires_grad_(requires_grad)
