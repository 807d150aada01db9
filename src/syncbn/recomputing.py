"""Less memory: activations that the backward makes again rather than keeping them from the forward.

A layer keeps its input x for its own backward. Its output y, normalised and after the ReLU, is kept too, by whoever
comes next: a convolution, a pool. But y follows from x in one pass over memory. So within `recompute_activations`
whoever saves y saves a recipe of it, by which the first who needs it in the backward makes it again.

It stands on torch's saved-tensor hooks. A layer's autograd node has `outputs_again`, which knows how to make each of
its outputs; of a tensor that consists of outputs, `joined` remembers it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack, _pop_mode, _push_mode
from torch.utils.weak import WeakTensorKeyDictionary

_Hooks: TypeAlias = tuple[Callable[..., Any], Callable[..., Any]]
_joined = WeakTensorKeyDictionary()


@contextmanager
def recompute_activations(enabled: bool = True) -> Iterator[None]:
    """In this context, what follows syncbn's layers keeps no outputs of theirs for the backward, which remakes them.

    The gradients stay the same bit by bit. The passes of a layer move its activation 8 times; this adds 2. Worth it
    for layers that apply their ReLU themselves (``activation="relu"``); the outputs of those with a residual are kept.
    Does nothing where others have set saved-tensor hooks (activation checkpoints, `save_on_cpu`), under torch.func,
    and under torch.compile, which makes this choice itself.

    An output must not be changed behind autograd's back, as through ``y.data``: the backward would not see it. What
    follows an output needs what the layer keeps: where its gradients are taken after a backward through the layer, that
    one must ``retain_graph``.

    Args:
        enabled: whether to do so; False leaves a surrounding context as it is.

    Example:
        >>> with syncbn.recompute_activations():
        ...     loss = F.cross_entropy(network(images), labels)
        >>> loss.backward()
    """
    idle = not enabled or torch.compiler.is_compiling() or not torch.is_grad_enabled()
    idle = idle or _top_hooks() is not None or torch._C._are_functorch_transforms_active()
    with nullcontext() if idle else saved_tensors_hooks(_pack, _unpack):
        yield


def is_recomputing() -> bool:
    """Whether the code runs right inside `recompute_activations`."""
    return not torch.compiler.is_compiling() and _is_ours(_top_hooks())


def hooks_of_others() -> bool:
    """Whether the code runs inside somebody else's saved-tensor hooks, such as an activation checkpoint's."""
    hooks = _top_hooks()
    return hooks is not None and not _is_ours(hooks)


def unpack_hooks_of_others() -> list[Callable[..., Any]]:
    """The second hooks of all pairs of saved-tensor hooks in force, the innermost first, without our own."""
    found: list[_Hooks] = []
    try:
        while (hooks := _top_hooks()) is not None:  # torch shows the innermost alone
            torch._C._autograd._pop_saved_tensors_default_hooks()
            found.append(hooks)
    finally:
        for hooks in reversed(found):
            torch._C._autograd._push_saved_tensors_default_hooks(*hooks)
    return [hooks[1] for hooks in found if not _is_ours(hooks)]


def unseen_by_selective_checkpoints() -> AbstractContextManager[None]:
    """In this context, selective activation checkpoints see no operator.

    They replay a forward by counting its operators. A layer's recomputed forward runs others than its first, which
    sends a message and updates averages; so it is recomputed by the layer's own means, under any policy.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() == 0:
        return nullcontext()
    return _without_selective_checkpoints()


@contextmanager
def _without_selective_checkpoints() -> Iterator[None]:
    """Take the modes of `torch.utils.checkpoint` off the stack of dispatch modes, and leave the others in order."""
    modes = _get_current_dispatch_mode_stack()
    others = [mode for mode in modes if not _is_of_checkpoint(mode)]
    try:
        _replace_modes(modes, others)
        yield
    finally:
        _replace_modes(others, modes)


def _replace_modes(all: Sequence[TorchDispatchMode], new: Sequence[TorchDispatchMode]) -> None:
    for _ in all:  # torch keeps modes of its own below those of users, so none can be taken from between
        _pop_mode()
    for mode in new:
        _push_mode(mode)


def _is_of_checkpoint(mode: TorchDispatchMode) -> bool:
    return any(kind.__module__ == "torch.utils.checkpoint" for kind in type(mode).__mro__)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """`torch.cat` of parts (N, C, ...) along the channels, which a backward can make again of its parts."""
    result = torch.cat(list(parts), dim=1)
    if is_recomputing() and result.requires_grad:
        kept = [_pack(part) for part in parts]
        recipe = Recipe(lambda: torch.cat([_unpack(part) for part in kept], dim=1))
        _joined[result] = recipe, result._version
    return result


def compact_indices(size: Sequence[int]) -> AbstractContextManager[Any]:
    """Where activations are recomputed, torch's max pools in this context keep indices in 2 or 4 bytes instead of 8.

    Args:
        size: (H, W) of the pool's input.
    """
    if not is_recomputing():
        return nullcontext()
    dtype = torch.int16 if size[0] * size[1] <= torch.iinfo(torch.int16).max else torch.int32

    def pack(tensor: Tensor) -> Any:
        return _Compact(tensor.to(dtype)) if tensor.dtype == torch.int64 else _pack(tensor)

    return saved_tensors_hooks(pack, _unpack)


class Kept(NamedTuple):
    """A tensor for later, and its version, which every change in place raises; None where torch counts none."""

    tensor: Tensor
    version: int | None

    def unchanged(self, what: str = "one of the variables needed for gradient computation") -> Tensor:
        """The tensor.

        Args:
            what: it is, for the message.

        Raises:
            RuntimeError: it has been changed in place, as autograd says it of the tensors that it keeps itself.
        """
        if _version_of(self.tensor) != self.version:
            raise RuntimeError(
                f"{what} has been modified by an inplace operation: a tensor of size {list(self.tensor.shape)} is at "
                f"version {self.tensor._version}; expected version {self.version} instead. Change a clone of it, or "
                "change it later"
            )
        return self.tensor


def keep(tensor: Tensor) -> Kept:
    """The tensor as it is now."""
    return Kept(tensor, _version_of(tensor))


class Recipe:
    """How a tensor is made again, once for all who saved it: it lives as long as one of them has yet to be served."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make: Callable[[], Tensor] | None = make
        self._made: Tensor | None = None

    def tensor(self) -> Tensor:
        """The tensor."""
        if self._made is None:
            assert self._make is not None
            with torch.no_grad():
                self._made = self._make()
            self._make = None  # and with it what this one alone was made of
        return self._made


class OutputsAgain:
    """Makes the outputs of a layer's autograd node again.

    Args:
        versions: of the outputs as they were made; None for those that cannot be made again.
        make: from the node and the number of the output.
    """

    def __init__(self, versions: Sequence[int | None], make: Callable[[Any, int], Tensor]) -> None:
        self.versions, self.make = versions, make
        self._recipes: WeakValueDictionary[int, Recipe] = WeakValueDictionary()

    def recipe(self, node: Any, i: int) -> Recipe:
        """Of output i; the same for all who ask."""
        recipe = self._recipes.get(i)
        if recipe is None:
            recipe = self._recipes[i] = Recipe(partial(self.make, node, i))
        return recipe


class _View(NamedTuple):
    """Part of a tensor that is made again."""

    recipe: Recipe
    size: Sequence[int]
    stride: Sequence[int]
    offset: int


class _Compact(NamedTuple):
    """Whole numbers in fewer bytes."""

    numbers: Tensor


def _pack(tensor: Tensor) -> Any:
    base = tensor if tensor._base is None else tensor._base
    # Whose user does not lie behind the layer in the graph may come when the layer has let go of its input.
    if tensor.grad_fn is None or tensor.dtype != base.dtype or tensor.is_neg():
        return keep(tensor)  # with hooks torch does not see to it that nobody changes what was saved
    recipe, version = _joined.get(base) or _recipe_of_output(base)
    if recipe is None or version != base._version:  # changed since
        return keep(tensor)
    return _View(recipe, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, _Compact):
        return packed.numbers.long()
    if isinstance(packed, _View):
        return packed.recipe.tensor().as_strided(*packed[1:])
    assert isinstance(packed, Kept)
    return packed.unchanged()


def _version_of(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


def _recipe_of_output(tensor: Tensor) -> tuple[Recipe | None, int | None]:
    """The recipe of a layer's output, and the version of the tensor that it makes."""
    node: Any = tensor.grad_fn
    outputs = getattr(node, "outputs_again", None)
    if not isinstance(outputs, OutputsAgain):
        return None, None
    version = outputs.versions[tensor.output_nr]
    return (None if version is None else outputs.recipe(node, tensor.output_nr)), version


def _top_hooks() -> _Hooks | None:
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _is_ours(hooks: _Hooks | None) -> bool:
    return hooks is not None and hooks[1] is _unpack
