"""Looking at what goes into a layer and what comes out, also where a network runs the layer together with others.

PyTorch's hooks fire when a layer is called. A layer that a network fuses with others is not called: the network then
shows what the layer would have been given and have returned.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

Look = Callable[[Tensor], None]


def observe_inputs(layer: nn.Module, look: Look) -> list[RemovableHandle]:
    """Have a function called with the first argument of each run of a layer, detached, until the handles are removed.

    Args:
        layer: Any module that is called, or a ``conv`` or ``bn`` of `inception_bn`.
        look: Must not change the tensor.
    """
    called = layer.register_forward_pre_hook(lambda _, inputs: look(inputs[0].detach()))
    return [called, _when_shown(layer, "input_looks", look)]


def observe_outputs(layer: nn.Module, look: Look) -> list[RemovableHandle]:
    """The same of what each run returns, where that is a tensor."""

    def hook(_: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            look(output.detach())

    return [layer.register_forward_hook(hook), _when_shown(layer, "output_looks", look)]


def is_observed(layer: nn.Module) -> bool:
    """Whether somebody looks at the layer."""
    return bool(getattr(layer, "input_looks", None) or getattr(layer, "output_looks", None))


def show(layer: nn.Module, input: Tensor, output: Tensor) -> None:
    """Show a run of a layer that was not called."""
    for look in getattr(layer, "input_looks", {}).values():
        look(input.detach())
    for look in getattr(layer, "output_looks", {}).values():
        look(output.detach())


def _when_shown(layer: nn.Module, kind: str, look: Look) -> RemovableHandle:
    looks = layer.__dict__.setdefault(kind, OrderedDict())
    handle = RemovableHandle(looks)
    looks[handle.id] = look
    return handle
