"""What users hand over that cannot be worked with: what it is, and what to do about it, in one line."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

_DTYPES = frozenset((torch.float64, torch.float32, torch.float16, torch.bfloat16))
_INTEGERS = frozenset(
    getattr(torch, name) for name in ("bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)))
)


def as_dense(x: Any, what: str) -> Tensor:
    """A tensor that `check_dense` lets pass; of one in oneDNN's own layout, which torch's layers take, its values."""
    if type(x) is Tensor and x.is_mkldnn:
        x = x.to_dense()
    check_dense(x, what)
    return cast(Tensor, x)


def check_dense(x: Any, what: str) -> None:
    """Refuse what is no dense tensor of a dtype that batch normalisation knows.

    Args:
        x: a tensor, one hopes.
        what: it is to be.

    Raises:
        ValueError: it is something else.
    """
    if (type(x) is not Tensor and not _is_tensor_with_values(x)) or not _is_dense(x):
        raise ValueError(f"expected a floating point tensor as {what}, got {_tensor_and_advice(x)}")


def _is_tensor_with_values(x: Any) -> bool:
    if getattr(type(x), "is_traced", False):
        raise ValueError("the network starts its layers itself, which group_messages leaves as it is")
    return isinstance(x, Tensor) and not is_lazy(x) and not torch.masked.is_masked_tensor(x)


def _is_dense(x: Tensor) -> bool:
    return x.dtype in _DTYPES and x.layout is torch.strided and not x.is_nested


def check_residual(residual: Tensor, input: Tensor) -> None:
    """Refuse a residual that is not like the input.

    Raises:
        ValueError: it is of another size or on another device.
    """
    if residual.shape != input.shape:
        raise ValueError(f"residual of size {list(residual.shape)} for an input of size {list(input.shape)}")
    if residual.device != input.device:
        raise ValueError(
            f"residual on {residual.device} for an input on {input.device}: move it with .to({str(input.device)!r})"
        )


def checked_parameters(layer: _BatchNorm, input: Tensor) -> list[Tensor | None]:
    """Weight, bias and running statistics. What the passes cannot read by its address alone is refused.

    Args:
        layer: whose parameters and buffers to look at.
        input: of it.

    Raises:
        ValueError: saying which of them is not (C), real and on the input's device, and what it is.
    """
    shape, device = (layer.num_features,), input.device
    names = ("weight", "bias", "running_mean", "running_var")
    found = [getattr(layer, name) for name in names]
    for name, v in zip(names, found, strict=True):
        if v is not None and (v.shape != shape or v.device != device or v.dtype not in _DTYPES):
            raise ValueError(_unfit(v, name, layer, device))
    if type(input) is not Tensor and isinstance(input, FakeTensor):
        _check_fake(layer, input)
    if (found[2] is None) != (found[3] is None):
        raise ValueError("running_mean and running_var must both be None, or neither")
    return found


def _unfit(v: Tensor, name: str, layer: _BatchNorm, device: torch.device) -> str:
    C = layer.num_features
    it = f"{name} of size {list(v.shape)} on {v.device} in a layer of {C} channels, for an input on {device}"
    if v.shape != (C,):
        return f"{it}: give it size [{C}]"
    if v.device != device:
        how = f".to_empty(device={str(device)!r}), and load its state" if v.is_meta else f".to({str(device)!r})"
        return f"{it}: move the layer with {how}"
    how = f"build the layer anew, and leave it out of .to({v.dtype})" if v.is_complex() else "use .float() on the layer"
    return f"{it}, is of {v.dtype}: {how}"


def _check_fake(layer: _BatchNorm, input: FakeTensor) -> None:
    if input.fake_mode.allow_non_fake_inputs:
        return
    for name, v in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]:
        if not isinstance(v, FakeTensor):
            raise ValueError(
                f"the input is a FakeTensor, and the layer's {name} is not: build the layer within the same "
                "FakeTensorMode, or make that with allow_non_fake_inputs=True"
            )


def check_module(module: Any, function: str) -> None:
    """Refuse what is no module, and scripted BatchNorm layers, which `function` would pass over in silence.

    Raises:
        ValueError: it is one of these.
    """
    if isinstance(module, type):
        raise ValueError(f"{function}: expected a module, got the class {module.__name__}: make an instance of it")
    if not isinstance(module, nn.Module):
        each = ": do it with each module in it" if isinstance(module, list | tuple | Mapping) else ""
        raise ValueError(f"{function}: expected a torch.nn.Module, got {_type_name(module)}{each}")
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule) and "BatchNorm" in part.original_name:
            raise ValueError(
                f"{function}: '{name}' is a scripted or traced {part.original_name}, which can no longer be changed: "
                f"call {function} before torch.jit"
            )


def check_list(values: Any, what: str) -> None:
    """Refuse what is no list of layers or tensors, a tensor among them, over whose rows one would iterate.

    Raises:
        ValueError: it is none.
    """
    if type(values) is list:
        return
    if isinstance(values, Tensor) or not (hasattr(values, "__len__") and hasattr(values, "__iter__")):
        raise ValueError(f"expected a list as {what}, got {_type_name(values)}: put it into a list, [...]")


def _tensor_and_advice(x: Any) -> str:
    if type(x).__module__ == "numpy":
        return f"a NumPy {type(x).__name__}: convert it with torch.as_tensor()"
    if not isinstance(x, Tensor):
        return f"{_type_name(x)}: {_advice_on_other(x)}"
    if is_lazy(x):
        return "an uninitialized parameter: run the lazy module that it belongs to first"
    return _about_tensor(x)


def _advice_on_other(x: Any) -> str:
    if x is None:
        return "the module before returned nothing"
    if isinstance(x, list | tuple | Mapping):
        return "give the one tensor in it that is meant, or call the layer for each"
    return "give a torch.Tensor"


def _about_tensor(x: Tensor) -> str:
    if torch.masked.is_masked_tensor(x):
        return "a masked tensor: fill what is masked with .to_tensor(value), or select the rows that are not"
    if x.is_nested:
        return "a nested tensor: normalise the values of its parts (n, C, ...) as one batch, torch.cat(x.unbind())"
    if x.layout is not torch.strided:
        kind = "sparse " if "sparse" in str(x.layout) else ""
        return f"a {kind}tensor ({x.layout}) of {x.dtype}: convert it with .to_dense()"
    if x.is_complex():
        return f"a complex tensor of {x.dtype}: normalise its parts, x.real and x.imag, by a layer each"
    if x.is_quantized:
        return f"a quantized tensor of {x.dtype}: convert it with .dequantize()"
    return f"a tensor of {x.dtype}: {_advice_on_dtype(x)}"


def _advice_on_dtype(x: Tensor) -> str:
    if x.dtype in _INTEGERS:
        return "convert it with .float()"
    if x.is_floating_point():
        return "it is a format for storage: convert it, times its scale, to torch.bfloat16 or torch.float32"
    return "it holds raw bits: convert it to the numbers that they stand for"


def _type_name(x: Any) -> str:
    if x is None:
        return "None"
    kind = type(x).__name__
    return f"{'an' if kind[0].lower() in 'aeiou' else 'a'} {kind}"
