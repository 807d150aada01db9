"""What every implementation of the passes shares: the map they apply, and how an activation lies in memory."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes


class Affine(NamedTuple):
    """The map y = (x - mean) / sqrt(var + eps) * weight + bias, then max(0, y) with relu.

    mean, var: (C), float64; weight, bias: (C), floating point, or None.
    """

    mean: Tensor
    var: Tensor
    eps: float
    weight: Tensor | None
    bias: Tensor | None
    relu: bool

    def copied(self) -> "Affine":
        """With copies of the parameters, the bias only for a ReLU: what the second pass of the backward reads."""
        bias = self.bias.clone() if self.relu and self.bias is not None else None
        return self._replace(weight=None if self.weight is None else self.weight.clone(), bias=bias)


class Map(NamedTuple):
    """An `Affine` before its mean and variance are known."""

    eps: float
    weight: Tensor | None
    bias: Tensor | None
    relu: bool

    def at(self, mean: Tensor, var: Tensor) -> Affine:
        """With this mean and variance."""
        return Affine(mean, var, *self)


class Signature(NamedTuple):
    """The last two numbers (2) of a message summed over the ranks, and what they are where the ranks agree."""

    found: Tensor
    expected: tuple[float, float]

    def poisoned(self, sums: Tensor) -> Tensor:
        """The sums, NaN where the ranks disagree: reading the numbers would stall a device."""
        first, second = self.expected
        return torch.where((self.found[0] == first) & (self.found[1] == second), sums, float("nan"))


class BatchSums(NamedTuple):
    """Of one activation over all ranks: sums [sum x (C), sum x^2 (C)], elements per channel, the check yet to make."""

    sums: Tensor
    M: float | Tensor
    signature: Signature | None


class Normalized(NamedTuple):
    """Output like x, and the mean and biased variance (C), float64, that it was normalised by."""

    y: Tensor
    mean: Tensor
    var: Tensor


class Span(NamedTuple):
    """The channels of one layer among those that lie side by side in an activation."""

    first: int
    number: int
    total: int

    def of(self, x: Tensor) -> Tensor:
        """These channels of x (N, total, ...), a view."""
        return x.narrow(1, self.first, self.number)

    def among_zeros(self, part: Tensor | None) -> Tensor | None:
        """(N, total, ...) of these channels, and zeros elsewhere."""
        if part is None:
            return None
        around = (self.first, self.total - self.first - self.number)
        return F.pad(part, (*[0] * (2 * (part.dim() - 2)), *around))

    def whole_like(self, part: Tensor) -> Tensor:
        """Fresh memory (N, total, ...), laid out like that of which `part` are these channels."""
        N, _, *space = part.shape
        return part.new_empty_strided((N, self.total, *space), part.stride())


class Upstream(NamedTuple):
    """What the backward of one normalisation starts from.

    dy: gradient of the output, see `ops.upstream_gradient`; x: input; affine: the map; y: output, only where the
    ReLU's mask cannot be computed again from x, whose map then is without.
    """

    dy: Tensor
    x: Tensor
    affine: Affine
    y: Tensor | None


class Gradient(NamedTuple):
    """What the first pass of the backward finds on this rank, all in one pass over dy and x.

    sums: [sum dy (C), sum dy * (x - mean) (C)], float64; weight, bias: gradients of the parameters, in their dtype.
    """

    sums: Tensor
    weight: Tensor | None
    bias: Tensor | None


class Running(NamedTuple):
    """Moving averages (C) in float32 or float64, the number of steps they took (or None), and their momentum.

    A momentum of None averages over all steps so far.
    """

    mean: Tensor
    var: Tensor
    steps: Tensor | None
    momentum: float | None


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which an activation of `dtype` is processed: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


_HAVE_FLOAT64 = {"cpu": True, "cuda": True, "meta": True, "mps": False}
_asked: dict[torch.device, bool] = {}


def has_float64(device: torch.device) -> bool:
    """Whether the device computes in float64: Apple's GPUs, Gaudi and some of Intel's GPUs do not."""
    known = _HAVE_FLOAT64.get(device.type)
    return _asked_once(device) if known is None else known


def _asked_once(device: torch.device) -> bool:
    if device not in _asked:
        _asked[device] = _computes_in_float64(device)
    return _asked[device]


# What torch.compiler.assume_constant_result sets; that would import the compiler.
_asked_once._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _computes_in_float64(device: torch.device) -> bool:
    """Whether 2^-40 beside 1 is kept: some devices make float64 tensors, and compute in float32."""
    try:
        if device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64:
            return False
        with _disable_current_modes():
            sums = torch.ones(1, dtype=torch.float64, device=device) + 2.0**-40
            return float((sums - 1).cpu()) == 2.0**-40
    except Exception:  # whatever a device's library raises: it does not compute in float64
        return False


def statistics_device(device: torch.device) -> torch.device:
    """Where the sums and moments of activations on a device are: there, or on the host where it has no float64."""
    return device if has_float64(device) else torch.device("cpu")


def as_statistic(v: Tensor) -> Tensor:
    """V in float64 on its `statistics_device`. To move it to the host waits for the device."""
    return v if v.dtype == torch.float64 else v.to(statistics_device(v.device)).double()


def beside(v: Tensor, x: Tensor) -> Tensor:
    """A statistic v as it can be combined with x: as it is, or from the host in the compute dtype of x."""
    return v if v.device == x.device else v.to(compute_dtype(x.dtype)).to(x.device)


_MODES = torch._C._TorchDispatchModeKey
_TRACERS = (_MODES.FAKE, _MODES.PROXY, _MODES.FUNCTIONAL)
_WITH_MEMORY = (Tensor, torch.nn.Parameter)  # others, such as a tracer's, may have none
_KEEP_NOTHING_BACK = {*_WITH_MEMORY, type(None)}


def has_memory(x: Tensor) -> bool:
    """Whether x has memory of its own, and no tracer or transform has to see what is done with it."""
    if torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack() > 0 and any(map(torch._C._get_dispatch_mode, _TRACERS)):
        return False
    return type(x) in _WITH_MEMORY and not torch._C._are_functorch_transforms_active()


def have_memory(tensors: Iterable[Tensor | None]) -> bool:
    """Whether all of them have memory of their own: what `has_memory` asks of an activation beside them."""
    return _KEEP_NOTHING_BACK.issuperset(map(type, tensors))


def need_operators(tensors: Iterable[Tensor | None]) -> bool:
    """Whether what is done with them must be operators, for others to see.

    So it is with subclasses that define ``__torch_dispatch__``, but for fake tensors.
    """
    kinds = set(map(type, tensors))
    return not kinds <= _KEEP_NOTHING_BACK and any(map(_dispatches, kinds))


def are_batched(tensors: Iterable[Tensor]) -> bool:
    """Whether some are what torch's older vmap makes of gradients (``is_grads_batched``): it, too, needs operators."""
    return any(map(torch._C._functorch.is_legacy_batchedtensor, tensors))


def _dispatches(kind: Any) -> bool:
    if kind in _KEEP_NOTHING_BACK:
        return False
    return kind.__torch_dispatch__ is not Tensor.__torch_dispatch__ and not issubclass(kind, FakeTensor)


def as_stored(t: Tensor) -> bool:
    """Whether the elements of t lie in memory as they are: not to be negated yet, nor zeros that take no memory."""
    return not (t.is_neg() or t._is_zerotensor())


@overload
def stored(v: Tensor) -> Tensor: ...
@overload
def stored(v: Tensor | None) -> Tensor | None: ...
def stored(v: Tensor | None) -> Tensor | None:
    """V itself where its elements lie in memory as they are, one after the other; else such a copy. None of None."""
    if v is None or (v.is_contiguous() and as_stored(v)):
        return v
    return v.clone(memory_format=torch.contiguous_format)


def address(t: Tensor | None) -> int | None:
    """Where the elements of t begin, None of None.

    Raises:
        ValueError: there are none, though t is not empty. A null pointer would be taken for None, or read.
    """
    if t is None:
        return None
    found = t.data_ptr()
    if not found and t.numel():
        raise ValueError(
            f"a BatchNorm layer was given a tensor of size {list(t.shape)} without memory: it was freed, as FSDP frees "
            "parameters after the forward of the module that it wraps; call that module, not the layer in it, or give "
            "a tensor with memory"
        )
    return found


def copy_like(x: Tensor, other: Tensor) -> Tensor:
    """A copy of `other` in the layout and dtype of x.

    Raises:
        ValueError: it is sparse, which of all that comes here a gradient alone may be.
    """
    if other.layout is not torch.strided:
        raise ValueError(
            f"the gradient of a BatchNorm layer's output is a sparse tensor ({other.layout}): let what takes the "
            "output return a dense one, such as torch.gather without sparse_grad=True"
        )
    return torch.empty_like(x).copy_(other)


def at_least_one(M: Any) -> Any:
    """max(M, 1), so that an empty batch divides by no zero."""
    return M.clamp(min=1) if isinstance(M, Tensor) else max(M, 1.0)


def per_channel(v: Tensor, x: Tensor) -> Tensor:
    """View v (C) so that it broadcasts over x (N, C, ...)."""
    return v.view([-1] + [1] * (x.dim() - 2))


def is_rows(x: Tensor) -> bool:
    """Whether x (N, C, ...) is channels-last in memory, at any number of dimensions: rows of C elements."""
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.movedim(1, -1).is_contiguous()


def in_rows(x: Tensor) -> bool:
    """Whether the passes read x, dense or a `Span` of what is, as rows; else as planes."""
    one_per_channel = x.numel() == x.shape[0] * x.shape[1]
    if one_per_channel or x.is_contiguous():
        return one_per_channel
    return is_rows(x) or _even_step(x, range(1, x.dim())) != 1


def step_of(dy: Tensor, x: Tensor) -> int | None:
    """How far apart the rows of dy (N, C, ...) are, or the images where x lies in planes; in elements.

    It is what lets a pass read channels cut out of a wider tensor without a copy.

    Returns:
        None where dy does not lie in memory like x but for that distance.
    """
    if x.numel() == 0:
        return 0  # nothing is read
    C, positions = x.shape[1], [d for d in range(x.dim()) if d != 1]
    if in_rows(x):
        return _even_step(dy, positions) if C == 1 or dy.stride(1) == 1 else None
    within = _even_step(dy, range(1, x.dim()))
    return dy.stride(0) if within == 1 else None


def _even_step(t: Tensor, dims: Sequence[int]) -> int | None:
    """The step between neighbours along dims taken as one; None where it varies."""
    step, following = None, 0
    for d in reversed(dims):
        if t.shape[d] == 1:
            continue
        if step is None:
            step = t.stride(d)
        elif t.stride(d) != following:
            return None
        following = t.stride(d) * t.shape[d]
    return 1 if step is None else step


def dense(x: Tensor) -> Tensor:
    """X itself where it lies in memory as planes or as rows, else a contiguous copy."""
    return x if x.is_contiguous() or is_rows(x) else x.contiguous()
