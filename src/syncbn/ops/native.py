"""The passes compiled for the CPU (native.cpp), over float64, float32, bfloat16 and float16.

They are built when the package is installed, where there is a C++ compiler; elsewhere `aten` does the same, slower.
The environment variable SYNCBN_NATIVE=0 leaves them unused.
"""

import ctypes
import os
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from syncbn.ops.common import Affine, Gradient, Running, address, as_stored, has_memory, in_rows, step_of, stored

_CODES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2, torch.float16: 3}


class _Layout(ctypes.Structure):
    _fields_ = [
        ("N", ctypes.c_int64),
        ("C", ctypes.c_int64),
        ("S", ctypes.c_int64),
        ("dtype", ctypes.c_int32),
        ("rows", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    ]


class _Affine(ctypes.Structure):
    _fields_ = [
        ("mean", ctypes.c_void_p),
        ("var", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("eps", ctypes.c_double),
        ("parameter_dtype", ctypes.c_int32),
        ("relu", ctypes.c_int32),
    ]


def _load() -> dict[str, Any]:
    """The functions of native.cpp by name; none where they were not built or are not wanted."""
    path = Path(__file__).with_name("_native" + EXTENSION_SUFFIXES[0])
    if os.environ.get("SYNCBN_NATIVE", "1") == "0" or not path.exists():
        return {}
    library = ctypes.CDLL(str(path))
    pointer, layout, affine = ctypes.c_void_p, ctypes.POINTER(_Layout), ctypes.POINTER(_Affine)
    number, length, code = ctypes.c_double, ctypes.c_int64, ctypes.c_int32
    arguments = {
        "moments": [layout, *[pointer] * 3],
        "input_sums": [layout, *[pointer] * 2],
        "normalize": [layout, affine, *[pointer] * 3],
        "gradient": [layout, affine, pointer, length, *[pointer] * 4],
        "input_gradient": [layout, affine, pointer, length, *[pointer] * 2, number, pointer],
        "update_running": [length, code, *[pointer] * 2, number, number, *[pointer] * 3],
    }
    functions = {name: getattr(library, f"syncbn_{name}") for name in arguments}
    for name, function in functions.items():
        function.argtypes, function.restype = arguments[name], ctypes.c_int
    return functions


_functions = _load()
# Not every compiler knows float16.
_KNOWN = {
    dtype
    for dtype, code in _CODES.items()
    if _functions and not _functions["moments"](_Layout(dtype=code), *[None] * 3)
}


def takes(x: Tensor) -> bool:
    """Whether these passes can process x."""
    return x.is_cpu and x.dtype in _KNOWN and has_memory(x) and as_stored(x)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """As `ops.moments`."""
    mean, var = x.new_empty((2, x.shape[1]), dtype=torch.float64).unbind()
    _call("moments", _layout(x), address(x), mean.data_ptr(), var.data_ptr())
    return mean, var


def input_sums(x: Tensor) -> Tensor:
    """As `ops.input_sums`."""
    sums = x.new_empty(2 * x.shape[1], dtype=torch.float64)
    _call("input_sums", _layout(x), address(x), sums.data_ptr())
    return sums


def normalize(x: Tensor, affine: Affine, residual: Tensor | None) -> Tensor:
    """As `ops.normalize`."""
    y, affine = torch.empty_like(x), _plain(affine)
    _call("normalize", _layout(x), _structure(affine), address(x), address(residual), y.data_ptr())
    return y


def gradient(dy: Tensor, x: Tensor, affine: Affine) -> Gradient:
    """As `ops.gradient`."""
    plain = _plain(affine)
    sums = x.new_empty(2 * x.shape[1], dtype=torch.float64)
    weight, bias = (None if v is None else torch.empty_like(v) for v in (plain.weight, plain.bias))
    pointers = (address(x), sums.data_ptr(), address(weight), address(bias))
    _call("gradient", _layout(x), _structure(plain), address(dy), _step(dy, x), *pointers)
    return Gradient(sums, _in_dtype_of(affine.weight, weight), _in_dtype_of(affine.bias, bias))


def input_gradient(dy: Tensor, x: Tensor, affine: Affine, sums: Tensor, M: float) -> Tensor:
    """As `ops.input_gradient`."""
    dx, affine, sums = torch.empty_like(x), _plain(affine), sums.contiguous()
    pointers = (address(x), sums.data_ptr(), M, dx.data_ptr())
    _call("input_gradient", _layout(x), _structure(affine), address(dy), _step(dy, x), *pointers)
    return dx


def update_running(running: Running, mean: Tensor, var: Tensor, M: float) -> None:
    """As `ops.update_running`."""
    momentum = float("nan") if running.momentum is None else running.momentum
    averages = (address(running.mean), address(running.var), address(running.steps))
    code = _CODES[running.mean.dtype]
    _call("update_running", len(mean), code, mean.data_ptr(), var.data_ptr(), M, momentum, *averages)
    increment_version([t for t in running[:3] if t is not None])


def _call(name: str, *arguments: object) -> None:
    unknown_type = _functions[name](*arguments)
    assert not unknown_type, f"syncbn_{name} was given an element type that is not in _KNOWN"


def _layout(x: Tensor) -> _Layout:
    N, C = x.shape[:2]
    S = x.numel() // max(1, N * C)
    return _Layout(N, C, S, _CODES[x.dtype], in_rows(x), torch.get_num_threads())


def _plain(affine: Affine) -> Affine:
    """The map as C++ reads it: weight and bias of one dtype, the elements of all one after the other."""
    mean, var = stored(affine.mean), stored(affine.var)
    weight, bias = stored(affine.weight), stored(affine.bias)
    dtypes = {v.dtype for v in (weight, bias) if v is not None}
    if len(dtypes) > 1 or not dtypes <= _KNOWN:
        weight, bias = (None if v is None else v.double() for v in (weight, bias))
    return Affine(mean, var, affine.eps, weight, bias, affine.relu)


def _structure(affine: Affine) -> _Affine:
    mean, var, eps, weight, bias, relu = affine
    parameter = bias if weight is None else weight
    code = 0 if parameter is None else _CODES[parameter.dtype]
    return _Affine(mean.data_ptr(), var.data_ptr(), address(weight), address(bias), eps, code, relu)


def _step(dy: Tensor, x: Tensor) -> int:
    if dy.stride() == x.stride():
        return x.stride(0)
    step = step_of(dy, x)
    lies_like_x = step == x.shape[1] or x.numel() <= x.shape[1]
    assert step is not None and (lies_like_x or not in_rows(x)), "ops.upstream_gradient sees to it"
    return step


def _in_dtype_of(parameter: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    return gradient if gradient is None or parameter is None else gradient.to(parameter.dtype)
