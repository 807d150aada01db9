"""Networks whose BatchNorm layers share messages, found by tracing: `group_messages`.

A grouped network keeps its modules, its parameters and its class, of which its new class is a subclass. In training its
forward runs the network's graph in the order of `scheduling`; whenever no message would be sent it runs the network's
own forward. A graph holds for the modules' modes, hooks and attributes, and for the kind of input, that it was traced
with: for others it is traced again.
"""

import copyreg
import functools
import warnings
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

from syncbn.distributed import active_group
from syncbn.nn.checks import check_module
from syncbn.nn.convert import SyncBatchNormAct
from syncbn.nn.group_reference import GroupReference
from syncbn.nn.programs import compiled
from syncbn.nn.scheduling import Schedule, schedule
from syncbn.nn.sync_batch_norm import SyncBatchNorm
from syncbn.nn.tracing import HOOKS, Traced, Untraceable, is_hooked, trace

_JOINING = (SyncBatchNorm, SyncBatchNormAct)
_MOST_PLANS = 32


def group_messages(network: nn.Module, *example_inputs: Any) -> nn.Module:
    """Let the layers of a network that do not depend on each other share one message, in place.

    Args:
        network: converted by `convert_sync_batchnorm`, or built of `SyncBatchNorm`; not yet wrapped in
            DistributedDataParallel or torch.compile.
        example_inputs: arguments of its forward; of tensors only sizes, strides, dtypes and devices are read.

    Returns:
        `network`, with the methods `print_schedule`, `draw_schedule` and `ungroup`. Modules, parameters, buffers, hooks
        and `state_dict` are what they were.

    Raises:
        ValueError: the network has no `SyncBatchNorm`, or does not run on the inputs.

    Warns:
        A part of the network cannot be traced, and why. Its layers send a message each, as before.
    """
    check_module(network, "group_messages")
    _check_network(network)
    if not isinstance(network, Grouped):
        _become_grouped(network)
    network._grouping.plan_example(network, example_inputs)
    return network


class Grouped:
    """What a network becomes beside what it is."""

    _grouping: "Grouping"

    def print_schedule(self) -> None:
        """Print the messages of a training step: the layers of each, and what is computed while it travels."""
        print(self._grouping.describe())

    def draw_schedule(self, path: str | Path) -> None:
        """Draw the layers by message, and which needs which, to an image file."""
        from syncbn.nn.drawing import draw

        draw(self._grouping.shown_schedule(), Path(path))

    def ungroup(self) -> nn.Module:
        """Undo `group_messages`, in place; returns the network."""
        assert isinstance(self, nn.Module)
        self.__class__ = type(self)._ungrouped  # type: ignore
        del self.__dict__["_grouping"]
        return self

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles: the network as it was."""
        twin = object.__new__(type(self)._ungrouped)  # type: ignore
        twin.__dict__ = {name: value for name, value in self.__dict__.items() if name != "_grouping"}
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        make, arguments, *state = super().__reduce_ex__(protocol)
        if make is not copyreg.__newobj__:  # type: ignore[attr-defined]
            raise TypeError(f"{type(self).__name__} has a way of its own to be copied: call .ungroup() first")
        return _new_grouped, (type(self)._ungrouped, *arguments[1:]), *state  # type: ignore[attr-defined]


def _new_grouped(kind: type[nn.Module]) -> nn.Module:
    made = _grouped_class(kind)
    return made.__new__(made)


def _become_grouped(network: nn.Module) -> None:
    network.__dict__["_grouping"] = Grouping()
    network.__class__ = _grouped_class(type(network))


@functools.cache
def _grouped_class(kind: type[nn.Module]) -> type[nn.Module]:
    own_forward = kind.forward

    @functools.wraps(own_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._grouping.run(self, own_forward, args, kwargs)

    body = {"forward": forward, "_ungrouped": kind, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind)(f"Grouped{kind.__name__}", (Grouped, kind), body)


def _check_network(network: nn.Module) -> None:
    if isinstance(network, nn.parallel.DistributedDataParallel) or "_orig_mod" in network._modules:
        raise ValueError(f"group_messages: got a {type(network).__name__}: group the network in it before wrapping it")
    if isinstance(network, _BatchNorm):
        raise ValueError(f"group_messages: got a single layer, {type(network).__name__}: give the network that holds it")
    if "forward" in network.__dict__:
        raise ValueError("group_messages: the network's forward was replaced on the instance: group it before that")
    if any(isinstance(module, _JOINING) for module in network.modules()):
        return
    norms = Counter(type(m).__name__ for m in network.modules() if "norm" in type(m).__name__.lower())
    found = ", ".join(f"{number} {name}" for name, number in norms.items())
    advice = "convert it with convert_sync_batchnorm first" if _has_batch_norm(network) else "there is nothing to group"
    raise ValueError(f"group_messages: the network has no SyncBatchNorm; its norms: {found or 'none'}: {advice}")


def _has_batch_norm(network: nn.Module) -> bool:
    return any(isinstance(module, _BatchNorm) for module in network.modules())


class Snapshot:
    """What a graph takes for given about modules: classes, modes, children, hooks, and attributes that are no tensors.

    Args:
        modules: those whose forward the graph holds, and their layers.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = list(modules)
        self.dicts = [module.__dict__ for module in self.modules]
        self.children = [d["_modules"] for d in self.dicts]
        self.hooks = [d[name] for d in self.dicts for name in HOOKS]
        self.attributes = [
            (d, name, value)
            for d in self.dicts
            for name, value in d.items()
            if name not in ("training", "_layer_name") and isinstance(value, _WATCHED)
        ]
        self.seen = self._look()

    def holds(self) -> bool:
        """Whether the modules still are as they were."""
        return self.seen == self._look() and all(
            (now := d.get(name)) is value or (type(now) is type(value) and now == value)
            for d, name, value in self.attributes
        )

    def _look(self) -> tuple[list[Any], ...]:
        return (
            [type(module) for module in self.modules],
            [d["training"] for d in self.dicts],
            [child for children in self.children for child in children.values()],
            [len(children) for children in self.children],
            list(map(bool, self.hooks)),
        )


_WATCHED = (int, float, str, type(None), tuple, torch.dtype, torch.device, GroupReference, FunctionType, MethodType)


class Plan(NamedTuple):
    """How a network runs.

    Attributes:
        kind: of the inputs that it is for.
        sizes: of these inputs, where it is for them alone.
        snapshot: of the modules as it is for.
        traced: the graph; None where the network runs its own forward.
        schedule: of the graph.
        program: takes the tensors among the inputs' leaves, returns the leaves of the result.
    """

    kind: tuple[Any, ...]
    sizes: list[Any] | None
    snapshot: Snapshot
    traced: Traced | None = None
    schedule: Schedule | None = None
    program: Callable[..., list[Any]] | None = None

    def fits(self, kind: tuple[Any, ...], tensors: Sequence[Tensor]) -> bool:
        """Whether it is for such inputs, and the modules as they are."""
        return (
            self.kind == kind and (self.sizes is None or self.sizes == _sizes(tensors)) and self.snapshot.holds()
        )

    def run(self, tensors: Sequence[Tensor]) -> Any:
        """The network's result."""
        assert self.program is not None and self.traced is not None
        return pytree.tree_unflatten(self.program(*tensors), self.traced.result)


class Grouping:
    """A grouped network's plans; copies begin without any."""

    def __init__(self) -> None:
        self.plans = deque[Plan](maxlen=_MOST_PLANS)
        self.shown: Plan | None = None
        self.named = set[str]()  # parts that were said to be untraceable

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Grouping, ()

    def run(self, network: nn.Module, own_forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The network's forward."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        kind = _kind_of(leaves, spec)
        if kind is None:
            return own_forward(network, *args, **kwargs)
        plan = next((plan for plan in self.plans if plan.fits(kind, tensors)), None)
        if plan is None:
            plan = self._plan(network, kind, tensors, args, kwargs)
            self.plans.appendleft(plan)
        return own_forward(network, *args, **kwargs) if plan.program is None else plan.run(tensors)

    def plan_example(self, network: nn.Module, example_inputs: Sequence[Any]) -> None:
        """Plan a training step on these inputs, to be shown; says what cannot be traced."""
        layers = [m for m in network.modules() if isinstance(m, _JOINING)]
        modes = {module: module.training for module in network.modules()}
        if not any(layer.training for layer in layers):
            for module in modes:
                module.training = True
        try:
            self.shown = self._traced(network, (), [], example_inputs, {})
        finally:
            for module, training in modes.items():
                module.training = training

    def shown_schedule(self) -> Schedule:
        """That of the example."""
        if self.shown is None or self.shown.schedule is None:
            raise ValueError("no schedule: call group_messages with example inputs on a network that can be traced")
        return self.shown.schedule

    def describe(self) -> str:
        """A line for each message of a training step, and how many there are."""
        found = self.shown_schedule()
        lines = [f"{sum(len(m.layers) for m in found.messages)} layers, {len(found.messages)} messages each way"]
        for number, message in enumerate(found.messages, 1):
            beside = ", ".join(str(n.target) for n in message.meanwhile if n.op == "call_module")
            names = ", ".join(str(node.target) for node in message.layers)
            lines.append(f"{number:4d}  {names}" + (f"  (meanwhile: {beside})" if beside else ""))
        return "\n".join(lines)

    def _plan(self, network: nn.Module, kind: Any, tensors: Sequence[Tensor], args: Any, kwargs: Any) -> Plan:
        layers = [m for m in network.modules() if isinstance(m, _JOINING)]
        if not any(layer.training and layer._group() is not None for layer in layers):
            return Plan(kind, None, Snapshot(_with_norms(network)))
        try:
            return self._traced(network, kind, tensors, args, kwargs)
        except ValueError:  # which the network's own forward will raise, or not
            return Plan(kind, _sizes(tensors), Snapshot(_with_norms(network)))

    def _traced(self, network: nn.Module, kind: Any, tensors: Sequence[Tensor], args: Any, kwargs: Any) -> Plan:
        try:
            traced = trace(network, tuple(args), kwargs)
        except Untraceable as reason:
            self._say("", network, str(reason))
            return Plan(kind, None, Snapshot(_with_norms(network)))
        for path, reason in traced.refused.items():
            self._say(path, network.get_submodule(path), reason)
        order = schedule(traced.graph, _key_of)
        program = compiled(network, traced.graph, order)
        snapshot = Snapshot({**dict.fromkeys(_with_norms(network)), **dict.fromkeys(_parents(network, traced.graph))})
        return Plan(kind, _sizes(tensors) if traced.of_sizes else None, snapshot, traced, order, program)

    def _say(self, path: str, module: nn.Module, reason: str) -> None:
        if path not in self.named:
            self.named.add(path)
            where = f"'{path}' ({type(module).__name__})" if path else f"{type(module).__name__} itself"
            text = f"group_messages: {where} cannot be traced, so that its layers send a message each: {reason}"
            warnings.warn(text, stacklevel=2)


def _kind_of(leaves: Sequence[Any], spec: Any) -> tuple[Any, ...] | None:
    """What a graph takes for given about inputs beside their sizes; None for inputs that are not traced."""
    found: list[Any] = []
    for leaf in leaves:
        if type(leaf) in (Tensor, nn.Parameter) and leaf.layout is torch.strided:
            found.append((leaf.dim(), leaf.dtype, leaf.device, leaf.requires_grad))
        elif isinstance(leaf, _SIMPLE):
            found.append((type(leaf), leaf))
        else:
            return None
    return (active_group(None), torch.is_grad_enabled(), spec, found)


_SIMPLE = (int, float, str, type(None), torch.dtype, torch.device)


def _sizes(tensors: Sequence[Tensor]) -> list[Any]:
    return [(t.shape, t.stride()) for t in tensors]


def _with_norms(network: nn.Module) -> list[nn.Module]:
    """BatchNorm layers, and the modules that have some."""
    return [m for m in network.modules() if any(isinstance(part, _BatchNorm) for part in m.modules())]


def _parents(network: nn.Module, graph: fx.Graph) -> Iterator[nn.Module]:
    """The modules through which the graph's modules and parameters are reached."""
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            path = str(node.target)
            while path:
                path = path.rpartition(".")[0]
                yield network.get_submodule(path)


def _key_of(node: fx.Node) -> Hashable | None:
    """What layers of a message have in common; None of what is no layer that can join one."""
    layer = node.meta.get("module")
    if type(layer) not in _JOINING or not layer.training or is_hooked(layer) or not set(node.kwargs) <= {"residual"}:
        return None
    x = node.args[0] if node.args else None
    value = x.meta["value"] if isinstance(x, fx.Node) else None
    return (id(layer.process_group), value.device) if isinstance(value, Tensor) else None
