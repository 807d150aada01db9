"""Less memory: activations that the backward makes again rather than keeping them from the forward.

A layer keeps its input x for its own backward. Its output y, normalised and after the ReLU, is kept too, by whoever
comes next: a convolution, a pool. But y follows from x in one pass over memory. So within `recompute_activations`
whoever saves y saves a recipe of it, by which the first who needs it in the backward makes it again.

It stands on torch's saved-tensor hooks. A layer's autograd node has `output_again(node, i)`, which makes its output i,
and `versions` of its outputs, None for what has no recipe. Of a tensor that consists of outputs, `joined` knows it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_Hooks: TypeAlias = tuple[Callable[..., Any], Callable[..., Any]]
_JOINED = "_syncbn_recipe"


@contextmanager
def recompute_activations(enabled: bool = True) -> Iterator[None]:
    """In this context, what follows syncbn's layers keeps no outputs of theirs for the backward, which remakes them.

    Costs one pass over each such output in the backward (2 of the 8 times that a layer moves its activation become
    10) and changes no number. Worth it for layers that apply their ReLU themselves (``activation="relu"``) without a
    residual; the outputs of others are kept. Does nothing under torch.compile, which makes this choice itself,
    and inside an activation checkpoint.

    Args:
        enabled: whether to do so at all.

    Example:
        >>> with syncbn.recompute_activations():
        ...     loss = F.cross_entropy(network(images), labels)
        >>> loss.backward()
    """
    idle = not enabled or torch.compiler.is_compiling() or not torch.is_grad_enabled() or _top_hooks() is not None
    with nullcontext() if idle else saved_tensors_hooks(_pack, _unpack):
        yield


def is_recomputing() -> bool:
    """Whether the code runs right inside `recompute_activations`."""
    return not torch.compiler.is_compiling() and _is_ours(_top_hooks())


def hooks_of_others() -> bool:
    """Whether the code runs inside somebody else's saved-tensor hooks, such as an activation checkpoint's."""
    hooks = _top_hooks()
    return hooks is not None and not _is_ours(hooks)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """`torch.cat` of parts (N, C, ...) along the channels, which a backward can make again of its parts."""
    result = torch.cat(list(parts), dim=1)
    if is_recomputing():
        kept = [_pack(part) for part in parts]
        recipe = Recipe(lambda: torch.cat([_unpack(part) for part in kept], dim=1))
        setattr(result, _JOINED, (recipe, result._version))
    return result


def compact_indices(size: Sequence[int]) -> AbstractContextManager[Any]:
    """Max pools in this context keep their indices in 2 or 4 bytes instead of 8, where activations are recomputed.

    Args:
        size: (H, W) of the pool's input.
    """
    if not is_recomputing():
        return nullcontext()
    dtype = torch.int16 if size[0] * size[1] <= torch.iinfo(torch.int16).max else torch.int32

    def pack(tensor: Tensor) -> Any:
        return _Compact(tensor.to(dtype)) if tensor.dtype == torch.int64 else _pack(tensor)

    return saved_tensors_hooks(pack, _unpack)


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
    recipe, version = getattr(base, _JOINED, None) or _recipe_of_output(base)
    if recipe is None or version != base._version:  # changed since
        return tensor
    return _View(recipe, tensor.size(), tensor.stride(), int(tensor.storage_offset()))


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, _Compact):
        return packed.numbers.long()
    if isinstance(packed, _View):
        return packed.recipe.tensor().as_strided(*packed[1:])
    return packed


def _recipe_of_output(tensor: Tensor) -> tuple[Recipe | None, int | None]:
    """Of a layer's output, the same for all who ask, and the version of the tensor that it makes."""
    node: Any = tensor.grad_fn
    versions = getattr(node, "versions", None)
    if versions is None:
        return None, None
    i = tensor.output_nr
    if not hasattr(node, "recipes"):
        node.recipes = WeakValueDictionary()
    recipe: Recipe | None = node.recipes.get(i)
    if recipe is None:
        recipe = node.recipes[i] = Recipe(partial(node.output_again, node, i))
    return recipe, versions[i]


def _top_hooks() -> _Hooks | None:
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def _is_ours(hooks: _Hooks | None) -> bool:
    return hooks is not None and hooks[1] is _unpack
