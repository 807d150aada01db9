"""What a network with BatchNorm computes, as a graph: its forward run once on proxies that know an example's sizes.

Modules without a BatchNorm are one node each, called as they are. Those with one are looked into, unless somebody hooks
into them or their forward cannot be traced; such a module is one node, too.

A proxy stands for a tensor or for a size. What Python asks of a size (a condition, a length) is answered from the
example, and the graph then holds for inputs of these sizes only. What it asks of a tensor's values has no answer.
"""

import operator
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.proxy import TracerBase
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from syncbn.grouping.fakes import context_of_thread, fake_state, fakes_of, python_random_kept, random_states

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Of a tensor, what every input of the same kind has.
_OF_KIND = {"dtype", "device", "layout", "ndim", "dim", "ndimension", "requires_grad", "type", "get_device", "itemsize"}
_SIMPLE = (int, float, complex, str, bytes, type(None), type(...))
_patching = threading.RLock()


class Untraceable(Exception):
    """What a graph cannot hold; the message says what."""


class _Unknown:
    """The value of a node that fake tensors cannot compute."""


UNKNOWN = _Unknown()


class Traced(NamedTuple):
    """A network's graph.

    Attributes:
        graph: placeholders are the tensors among the arguments' leaves, in their order; the output is the list of the
            result's leaves. A node's meta has "value", the example's: fake tensors, or `UNKNOWN`; "writes", the
            storages that it changes in place; "ordered", whether it keeps its place among all such nodes: it draws
            random numbers, or nobody knows what it does; "module", the one that it calls.
        result: the structure of the network's result.
        inlined: the modules that were looked into, by path.
        refused: the modules that could not be, by path, and why.
        of_sizes: whether the graph holds only for inputs of the example's sizes and strides.
    """

    graph: fx.Graph
    result: pytree.TreeSpec
    inlined: dict[str, nn.Module]
    refused: dict[str, str]
    of_sizes: bool


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    return "forward" in module.__dict__ or any(module.__dict__[name] for name in HOOKS)


def trace(network: nn.Module, arguments: Sequence[Any], options: Mapping[str, Any]) -> Traced:
    """Trace the forward of a network.

    Args:
        network: in the modes in which it is to run.
        arguments: positional arguments of the forward; of tensors only sizes, strides, dtypes and devices are read.
        options: arguments by name.

    Raises:
        Untraceable: the network's own forward cannot be traced.
    """
    with _tracer(network) as tracer:
        return tracer.run(*fakes_of(arguments, options))


def run_on_fakes(network: nn.Module, arguments: Sequence[Any], options: Mapping[str, Any]) -> bool:
    """Run a network's forward on fake tensors, as far as they go; nothing is sent, and no parameter or buffer changes.

    Args:
        network: as in `trace`, like the rest.
        arguments: see there.
        options: see there.

    Returns:
        Whether it ran to its end.

    Raises:
        ValueError: it does not run on these arguments.
    """
    with _tracer(network):
        leaves, spec = fakes_of(arguments, options)
        fakes, named = pytree.tree_unflatten(leaves, spec)
        try:
            network.forward(*fakes, **named)
        except Exception as error:
            # Fake tensors have no values, and are no plain ones.
            of_fakes = isinstance(error, RuntimeError) and re.search("fake|subclass", str(error), re.IGNORECASE)
            if of_fakes or type(error).__module__.startswith("torch."):
                return False
            raise ValueError(f"group_messages: the network does not run on these inputs: {_reason(error)}") from error
    return True


@contextmanager
def _tracer(network: nn.Module) -> Iterator["_Tracer"]:
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    with _patching, torch.enable_grad(), mode, python_random_kept(), fake_state(network, mode):
        tracer = _Tracer(network)
        with tracer.patched():
            yield tracer


class _Traced(Tensor):
    """A tensor of the graph. Whatever is asked of it goes through `_EveryFunction`."""

    is_traced = True
    node: fx.Node

    @staticmethod
    def of(node: fx.Node) -> "_Traced":
        value = node.meta["value"]
        made = Tensor._make_wrapper_subclass(
            _Traced, value.shape, value.stride(), dtype=value.dtype, device=value.device
        )
        made.node = node
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise Untraceable(f"it calls {function} in a way that a graph does not see")


class _Proxy(fx.Proxy):
    """A value of the graph that is no tensor, or unknown; a size, mostly."""

    tracer: Any

    @property  # type: ignore[misc]
    def __class__(self) -> type:  # what isinstance asks, too
        return type(self.tracer.known(self.node, "isinstance"))

    def __getattr__(self, name: str) -> Any:
        if callable(getattr(self.tracer.known(self.node, name), name)):
            return partial(_call_method, self, name)
        return self.tracer.create_proxy("call_function", getattr, (self, name), {})

    def __bool__(self) -> bool:
        return bool(self.tracer.asked(self.node))

    def __len__(self) -> int:
        return len(self.tracer.known(self.node, "len"))  # the same for all sizes

    def __iter__(self) -> Iterator[Any]:
        return (self[i] for i in range(len(self)))  # type: ignore[index]

    def __index__(self) -> int:
        return operator.index(self.tracer.asked(self.node))

    def __int__(self) -> int:
        return int(self.tracer.asked(self.node))

    def __float__(self) -> float:
        return float(self.tracer.asked(self.node))

    def __ceil__(self) -> int:
        return self.tracer.asked(self.node).__ceil__()

    def __floor__(self) -> int:
        return self.tracer.asked(self.node).__floor__()

    def __round__(self, digits: int | None = None) -> Any:
        return round(self.tracer.asked(self.node), digits)

    def __contains__(self, item: Any) -> bool:
        return item in self.tracer.asked(self.node)

    def __hash__(self) -> int:
        return id(self)


def _call_method(proxy: _Proxy, name: str, *args: Any, **kwargs: Any) -> Any:
    return proxy.tracer.create_proxy("call_method", name, (proxy, *args), kwargs)


class _Tracer(TracerBase):
    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.graph = fx.Graph()
        self.paths = {module: path for path, module in network.named_modules()}
        self.with_norm = {
            m
            for m in self.paths
            if not isinstance(m, _BatchNorm) and any(isinstance(n, _BatchNorm) for n in m.modules())
        }
        self.tensors = {id(t): path for path, t in [*network.named_parameters(), *network.named_buffers()]}
        self.inlined, self.refused = dict[str, nn.Module](), dict[str, str]()
        self.of_sizes = False
        self.active = False  # whether the network's code runs on proxies
        self.context = context_of_thread()

    def run(self, leaves: list[Any], spec: pytree.TreeSpec) -> Traced:
        proxies = [self._placeholder(i, leaf) if isinstance(leaf, Tensor) else leaf for i, leaf in enumerate(leaves)]
        arguments, options = pytree.tree_unflatten(proxies, spec)
        try:
            result = self._inline(self.network, "", arguments, options)
            outputs, result_spec = pytree.tree_flatten(result)
            self.graph.output([self.create_arg(output) for output in outputs])
        except Untraceable:
            raise
        except Exception as error:  # the network's own code runs on proxies: anything may be raised
            raise Untraceable(_reason(error)) from error
        return Traced(self.graph, result_spec, self.inlined, self.refused, self.of_sizes)

    def _placeholder(self, i: int, value: Tensor) -> Any:
        node = self.graph.placeholder(f"input_{i}")
        node.meta.update(value=value, writes=set(), ordered=False)
        return self.proxy_of(node)

    # ---- what the network's code does --------------------------------------------------------------

    @contextmanager
    def patched(self) -> Iterator[None]:
        """See each call of a module, each parameter and buffer that is read, and each function of torch's."""
        call, getattribute, thread = nn.Module.__call__, nn.Module.__getattr__, threading.get_ident()

        def see_call(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != thread:
                return call(module, *args, **kwargs)
            return self._call(module, args, kwargs)

        def see_attribute(module: nn.Module, name: str) -> Any:
            found = getattribute(module, name)
            if self.active and isinstance(found, Tensor) and threading.get_ident() == thread:
                return self._attribute(found)
            return found

        try:
            nn.Module.__call__, nn.Module.__getattr__ = see_call, see_attribute  # type: ignore
            with _EveryFunction(self):
                yield
        finally:
            nn.Module.__call__, nn.Module.__getattr__ = call, getattribute  # type: ignore

    def _call(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if not self.active:
            if isinstance(module, _BatchNorm) and args and isinstance(args[0], Tensor):
                return args[0] * 1  # of its kind; nothing is sent or updated
            return module.forward(*args, **kwargs)
        path = self.paths.get(module)
        if path is None:
            raise Untraceable(f"it calls a {type(module).__name__} that is not among its modules")
        if module not in self.with_norm or is_hooked(module) or type(module).__module__.startswith("torch.nn.parallel"):
            return self.create_proxy("call_module", path, args, kwargs)
        last = next(iter(reversed(self.graph.nodes)), None)
        try:
            return self._inline(module, path, args, kwargs)
        except Exception as error:  # as above
            if path not in self.refused:
                self.refused[path] = _reason(error)
            for node in reversed(list(self.graph.nodes)):
                if node is last:
                    break
                self.graph.erase_node(node)
            return self.create_proxy("call_module", path, args, kwargs)

    def _inline(self, module: nn.Module, path: str, args: Any, kwargs: Any) -> Any:
        before, drawn = _attributes(module), random_states()
        was, self.active = self.active, True
        try:
            result = module.forward(*args, **kwargs)
        finally:
            self.active = was
        changed = [name for name, value in _attributes(module).items() if not _is_same(before.get(name, before), value)]
        if changed:
            raise Untraceable(f"its forward sets self.{changed[0]}")
        if random_states() != drawn:
            raise Untraceable("its forward draws random numbers in Python or NumPy")
        self.inlined[path] = module
        return result

    def _attribute(self, tensor: Tensor) -> Any:
        return self.create_proxy("get_attr", self._path_of(tensor), (), {})

    def _path_of(self, tensor: Tensor) -> str:
        path = self.tensors.get(id(tensor))
        if path is None:
            raise Untraceable(f"it uses a tensor of size {list(tensor.shape)} that is neither parameter nor buffer")
        return path

    def known(self, node: fx.Node, asked: str) -> Any:
        """The example's value, of whose kind the network's Python code asks."""
        value = node.meta["value"]
        if value is UNKNOWN:
            raise Untraceable(f"it asks {asked} of what {_target_name(node)} returns, which only a run can tell")
        return value

    def asked(self, node: fx.Node) -> Any:
        """The example's value, for the network's Python code."""
        value = node.meta["value"]
        if value is UNKNOWN or isinstance(value, Tensor):
            raise Untraceable(f"its control flow depends on what {_target_name(node)} computes")
        self.of_sizes = True
        return value

    def proxy_of(self, node: fx.Node) -> Any:
        """What stands for a node."""
        with self._aside():
            return _Traced.of(node) if isinstance(node.meta["value"], Tensor) else _Proxy(node, self)

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """Within it, code runs that is not the network's."""
        was, self.active = self.active, False
        try:
            yield
        finally:
            self.active = was

    # ---- nodes ---------------------------------------------------------------------------------------

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *_: Any, **__: Any) -> Any:
        """Add a node; returns the example's value where Python may as well have that."""
        if context_of_thread() != self.context:
            raise Untraceable("it changes how gradients, autocast or saved tensors are handled")
        node = self.graph.create_node(kind, target, self.create_arg(tuple(args)), self.create_arg(dict(kwargs)))
        if kind == "call_module":
            node.meta["module"] = self.network.get_submodule(target)
        with self._aside():
            value = node.meta["value"] = self._evaluate(node)
        if value is UNKNOWN or value is None or _has_tensors(value):
            return None if value is None else self.proxy_of(node)
        name = _asked_name(target, args)
        if name not in _OF_KIND and (type(value) in (int, float, torch.Size) or isinstance(value, tuple | list)):
            return self.proxy_of(node)
        if name not in _OF_KIND and not str(name).startswith("is_"):
            self.of_sizes = True
        if not node.meta["writes"]:
            self.graph.erase_node(node)
        return value

    def create_arg(self, a: Any) -> Any:
        """An argument with the nodes in the place of their proxies."""
        kind = type(a)
        if kind in (_Proxy, _Traced):
            return a.node
        if isinstance(a, Tensor):
            return self._attribute(a).node
        if kind in (tuple, torch.Size):
            return tuple(map(self.create_arg, a))
        if isinstance(a, tuple) and hasattr(a, "_fields"):
            return kind(*map(self.create_arg, a))
        if kind is list:
            return [self.create_arg(one) for one in a]
        if kind is dict:
            return {key: self.create_arg(value) for key, value in a.items()}
        if kind is slice:
            return slice(*map(self.create_arg, (a.start, a.stop, a.step)))
        if _holds_proxy(a) or any(map(_is_proxy, pytree.tree_leaves(a))):
            raise Untraceable(f"it puts tensors into a {kind.__name__}")
        return a

    def _evaluate(self, node: fx.Node) -> Any:
        """The node's value for the example; notes what it changes in place and whether it is random."""
        fakes = [
            leaf for leaf in pytree.tree_leaves(fx.node.map_arg((node.args, node.kwargs), _value)) if leaf is not None
        ]
        tensors = [leaf for leaf in fakes if isinstance(leaf, Tensor)]
        node.meta.update(writes=set(), ordered=False)
        unknown = any(leaf is UNKNOWN for leaf in fakes)
        versions = [t._version for t in tensors]
        try:
            with _SeesRandom() as seen:
                value = UNKNOWN if unknown else self._compute(node)
        except Exception:  # fake tensors know neither values nor every operator
            value = UNKNOWN
        changed = [t for t, version in zip(tensors, versions, strict=True) if value is UNKNOWN or t._version != version]
        node.meta["writes"] = {storage_of(t) for t in changed}
        node.meta["ordered"] = value is UNKNOWN or seen.random or self._is_opaque(node)
        return value

    def _compute(self, node: fx.Node) -> Any:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), _value)
        if node.op == "get_attr":
            owner, _, name = str(node.target).rpartition(".")
            module = self.network.get_submodule(owner)
            return module._parameters.get(name) if name in module._parameters else module._buffers[name]
        if node.op == "call_module":
            return self._call(node.meta["module"], args, kwargs)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    def _is_opaque(self, node: fx.Node) -> bool:
        """Whether it may send messages, or do what a hook does."""
        if node.op != "call_module":
            return False
        module = node.meta["module"]
        return module in self.with_norm or any(is_hooked(part) for part in module.modules())


class _EveryFunction(TorchFunctionMode):
    """Puts every function of torch's that the network's code calls into the graph, also one without proxies."""

    def __init__(self, tracer: _Tracer) -> None:
        self.tracer = tracer

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self.tracer.active or function is torch._C._set_grad_enabled:
            return function(*args, **kwargs)
        if function in _CONCRETE:
            return self._concrete(function, *args, **kwargs)
        if getattr(function, "__name__", "") == "__set__":
            raise Untraceable(f"it sets .{_asked_name(function, args)} of a tensor")
        if getattr(function, "__name__", "") == "__get__":
            name = _asked_name(function, args)
            return self.tracer.create_proxy("call_function", getattr, (args[0], name), {})
        return self.tracer.create_proxy("call_function", function, args, kwargs)

    def _concrete(self, function: Any, tensor: Any, *args: Any) -> Any:
        """What Python needs to know now."""
        if function is Tensor.__len__:
            return operator.index(tensor.shape[0])
        if function is Tensor.__iter__:
            return iter([tensor[i] for i in range(tensor.shape[0])])
        if function is Tensor.__format__ or function is Tensor.__repr__:
            return "a traced tensor"
        if function is Tensor.__hash__:
            return id(tensor)
        node = getattr(tensor, "node", None)
        what = "a tensor's values" if node is None else f"what {_target_name(node)} computes"
        raise Untraceable(f"its control flow depends on {what}")


_CONCRETE = {
    getattr(Tensor, name)
    for name in (
        *("__len__", "__iter__", "__hash__", "__format__", "__repr__", "__bool__", "__int__", "__float__"),
        *("__index__", "__complex__", "__contains__", "__array__", "item", "tolist", "numpy", "is_nonzero", "data_ptr"),
    )
}


class _SeesRandom(TorchDispatchMode):
    """Notes whether an operator draws random numbers."""

    random = False

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.random |= torch.Tag.nondeterministic_seeded in function.tags
        return function(*args, **kwargs or {})


def storage_of(t: Tensor) -> int:
    """By which two tensors that share memory can be told."""
    return t.untyped_storage()._cdata


def _value(node: fx.Node) -> Any:
    return node.meta["value"]


def _has_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))


def _holds_proxy(a: Any) -> bool:
    """Whether an object that torch cannot take apart has a proxy among its attributes."""
    return any(map(_is_proxy, getattr(a, "__dict__", {}).values()))


def _is_proxy(a: Any) -> bool:
    return type(a) in (_Proxy, _Traced)


def _asked_name(target: Any, args: Sequence[Any]) -> str:
    """The attribute or method of a tensor that a function is, if it is one."""
    if target is getattr:
        return str(args[1])
    name = getattr(target, "__name__", str(target))
    return getattr(target.__self__, "__name__", name) if name == "__get__" else name


def _target_name(node: fx.Node) -> str:
    target: Any = node.target
    return target if isinstance(target, str) else getattr(target, "__name__", str(target))


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, Untraceable) else f"{type(error).__name__}: {text[:200]}"


def _attributes(module: nn.Module) -> dict[str, Any]:
    """Values by name, and of lists and the like how long they are, too."""
    own = {name: value for name, value in module.__dict__.items() if name not in _STATE}
    grown = {f"{name}, a {type(v).__name__}": len(v) for name, v in own.items() if isinstance(v, list | dict | set)}
    return own | grown | module._parameters | module._buffers | module._modules


def _is_same(before: Any, now: Any) -> bool:
    return before is now or (type(before) is type(now) is int and before == now)


_STATE = ("_parameters", "_buffers", "_modules")
