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
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook
from torch.utils import _pytree as pytree

from syncbn.collectives.groups import active_group
from syncbn.grouping.programs import compiled
from syncbn.grouping.scheduling import Schedule, SharedMessage, schedule
from syncbn.grouping.tracing import HOOKS, Traced, Untraceable, is_hooked, run_on_fakes, trace
from syncbn.nn.checks import check_module
from syncbn.nn.convert import SyncBatchNormAct
from syncbn.nn.group_reference import GroupReference
from syncbn.nn.sync_batch_norm import SyncBatchNorm

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
    run_on_fakes(network, example_inputs, {})
    if not isinstance(network, Grouped):
        _become_grouped(network)
    _grouping_of(network).plan_example(network, example_inputs, {})
    return network


class Grouped:
    """What a network becomes beside what it is."""

    _grouping: "Grouping"

    def print_schedule(self) -> None:
        """Print the messages of a training step: the layers of each, and what is computed while it travels."""
        print(self._grouping.describe())

    def draw_schedule(self, path: str | Path) -> None:
        """Draw the layers by message, and which needs which, to an image file."""
        from syncbn.grouping.drawing import draw

        draw(self._grouping.schedules(), Path(path))

    def ungroup(self) -> nn.Module:
        """Undo `group_messages`, in place; returns the network."""
        assert isinstance(self, nn.Module)
        parts, self.__class__ = self._grouping.parts, type(self)._ungrouped  # type: ignore
        del self.__dict__["_grouping"]
        for part in parts:
            part.ungroup()  # type: ignore[operator]
        return self

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script compiles: the network as it was."""
        twin = object.__new__(type(self)._ungrouped)  # type: ignore
        twin.__dict__ = {name: value for name, value in self.__dict__.items() if name != "_grouping"}
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(protocol)
        make, arguments, *state = reduced
        if make is not copyreg.__newobj__:  # type: ignore[attr-defined]
            raise TypeError(f"{type(self).__name__} has a way of its own to be copied: call .ungroup() first")
        return _new_grouped, (type(self)._ungrouped, *arguments[1:]), *state  # type: ignore[attr-defined]


def _new_grouped(kind: Any) -> nn.Module:
    made = _grouped_class(kind)
    return made.__new__(made)


def _grouping_of(network: Any) -> "Grouping":
    return network._grouping


def _become_grouped(network: nn.Module) -> None:
    network.__dict__["_grouping"] = Grouping()
    kind: Any = type(network)
    network.__class__ = _grouped_class(kind)


@functools.cache
def _grouped_class(kind: Any) -> Any:
    own_forward = kind.forward

    @functools.wraps(own_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            plan = None if kwargs or not self.training else self._grouping.shown
            if plan is None or not _holds_in_graph(self._grouping, len(args)):
                return own_forward(self, *args, **kwargs)
            return plan.run(args)
        return self._grouping.run(self, own_forward, args, kwargs)

    body = {"forward": forward, "_ungrouped": kind, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return type(kind)(f"Grouped{kind.__name__}", (Grouped, kind), body)


def _holds_in_graph(grouping: "Grouping", arguments: int) -> bool:
    """Whether torch.compile may take the example's plan: evaluated when it traces, not in the graph."""
    plan = grouping.shown
    if plan is None or plan.traced is None or plan.traced.of_sizes or not plan.snapshot.holds():
        return False
    return arguments == len([node for node in plan.traced.graph.nodes if node.op == "placeholder"])


_holds_in_graph._dynamo_marked_constant = True  # type: ignore  # torch.compiler.assume_constant_result imports it all


def _check_network(network: nn.Module) -> None:
    if isinstance(network, nn.parallel.DistributedDataParallel) or "_orig_mod" in network._modules:
        raise ValueError(f"group_messages: got a {type(network).__name__}: group the network in it before wrapping it")
    if isinstance(network, _BatchNorm):
        raise ValueError(
            f"group_messages: got a single layer, {type(network).__name__}: give the network that holds it"
        )
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


class TracedPlan(NamedTuple):
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
        return self.kind == kind and (self.sizes is None or self.sizes == _sizes(tensors)) and self.snapshot.holds()

    def run(self, tensors: Sequence[Tensor]) -> Any:
        """The network's result."""
        assert self.program is not None and self.traced is not None
        return pytree.tree_unflatten(self.program(*tensors), self.traced.result)


class Grouping:
    """A grouped network's plans; copies begin without any."""

    def __init__(self) -> None:
        self.plans = deque[TracedPlan](maxlen=_MOST_PLANS)
        self.shown: TracedPlan | None = None  # of the example
        self.parts: list[nn.Module] = []  # of a network that cannot be traced as a whole: those that are grouped
        self.said = set[str]()  # which parts cannot be traced
        self.given: tuple[Any, Any] | None = None  # the last inputs that were not traced: those of `run_on_fakes`

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Grouping, ()

    def run(self, network: nn.Module, own_forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """The network's forward."""
        leaves, spec = pytree.tree_flatten((args, kwargs))
        kind = None if _has_any_global_hook() else _kind_of(leaves, spec)
        if kind is None:
            self.given = (args, kwargs) if any(isinstance(leaf, FakeTensor) for leaf in leaves) else None
            return own_forward(network, *args, **kwargs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        plan = next((plan for plan in self.plans if plan.fits(kind, tensors)), None)
        if plan is None:
            layers = [m for m in network.modules() if isinstance(m, _JOINING)]
            if any(layer.training and layer._group() is not None for layer in layers):
                plan = self._planned(network, kind, args, kwargs)
            else:
                plan = TracedPlan(kind, None, Snapshot(_with_norms(network)))
            self.plans.appendleft(plan)
        return own_forward(network, *args, **kwargs) if plan.program is None else plan.run(tensors)

    def plan_example(self, network: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Plan a training step on these inputs, to be shown; says what cannot be traced, and groups the parts of it."""
        modes = {module: module.training for module in network.modules()}
        if not any(module.training for module in modes if isinstance(module, _JOINING)):
            for module in modes:
                module.training = True
        try:
            kind = _kind_of(*pytree.tree_flatten((tuple(args), dict(kwargs))), as_if=Tensor)
            self.shown = self._planned(network, kind or (), args, kwargs, with_parts=True)
            self.plans.appendleft(self.shown)
        finally:
            for module, training in modes.items():
                module.training = training

    def _planned(self, network: nn.Module, kind: Any, args: Any, kwargs: Any, with_parts: bool = False) -> TracedPlan:
        traced, refused = None, {}
        try:
            traced = trace(network, args, kwargs)
            refused = traced.refused
        except Untraceable as reason:
            refused = {"": str(reason)}
        for path, why in refused.items():
            self._say(path, network.get_submodule(path), why)
        if with_parts:
            self.parts = _grouped_parts(network, [network.get_submodule(path) for path in refused], args, kwargs)
        if traced is None:
            return TracedPlan(kind, None, Snapshot(_with_norms(network)))
        for module in _called(traced.graph):
            if is_hooked(module) and not isinstance(module, Grouped) and _layers_in(module) > 1:
                _become_grouped(module)  # from outside it is one node; its hooks see it called
        order = schedule(traced.graph, _key_of)
        program = compiled(network, traced.graph, order)
        snapshot = Snapshot(dict.fromkeys([*_with_norms(network), *_parents(network, traced.graph)]))
        sizes = _sizes(pytree.tree_leaves((args, kwargs))) if traced.of_sizes else None
        return TracedPlan(kind, sizes, snapshot, traced, order, program)

    def _say(self, path: str, module: nn.Module, reason: str) -> None:
        if path not in self.said:
            self.said.add(path)
            where = f"'{path}' ({_kind_name(module)})" if path else f"the forward of {_kind_name(module)}"
            text = f"group_messages: {where} cannot be traced, so that it sends its messages as before: {reason}"
            warnings.warn(text, stacklevel=2)

    def schedules(self) -> list[Schedule]:
        """That of the example, or of the network's parts."""
        own = [] if self.shown is None or self.shown.schedule is None else [self.shown.schedule]
        return own + [one for part in self.parts for one in _grouping_of(part).schedules()]

    def describe(self) -> str:
        """A line for each message of a training step, and how many there are."""
        lines = (
            [] if self.schedules() else ["nothing of the network could be traced: a message each way for each layer"]
        )
        for found in self.schedules():
            number = sum(len(message.layers) for message in found.messages)
            lines.append(f"{number} layers, {len(found.messages)} messages each way")
            lines += [f"{i:4d}  {_describe(message)}" for i, message in enumerate(found.messages, 1)]
        return "\n".join(lines)


def _describe(message: SharedMessage) -> str:
    beside = ", ".join(str(node.target) for node in message.meanwhile if node.op == "call_module")
    names = ", ".join(str(node.target) for node in message.layers)
    return names + (f"  (meanwhile: {beside})" if beside else "")


def _grouped_parts(network: nn.Module, refused: Sequence[nn.Module], args: Any, kwargs: Any) -> list[nn.Module]:
    """Group what is in modules that cannot be traced: their children, or where these are not called, theirs.

    What fake tensors do not reach is planned when it first runs.
    """
    parts: list[nn.Module] = []
    candidates = [child for module in refused for child in module.children()]
    while candidates := [c for c in candidates if _layers_in(c) > 1 and not isinstance(c, Grouped)]:
        for candidate in candidates:
            _become_grouped(candidate)
        complete = run_on_fakes(network, args, kwargs)
        left = []
        for part in candidates:
            given = _grouping_of(part).given
            if given is None and (complete or _has_no_forward(part)):
                left += part.ungroup().children()  # type: ignore[operator]
                continue
            parts.append(part)
            if given is not None:
                _grouping_of(part).plan_example(part, *given)
        candidates = left
    return parts


def _has_no_forward(part: Any) -> bool:
    """Whether it is a list of modules, or the like."""
    return type(part)._ungrouped.forward is nn.Module.forward


def _called(graph: fx.Graph) -> list[nn.Module]:
    return [node.meta["module"] for node in graph.nodes if node.op == "call_module"]


def _layers_in(module: nn.Module) -> int:
    return sum(isinstance(part, _JOINING) for part in module.modules())


def _kind_name(module: nn.Module) -> str:
    kind: Any = type(module)
    return kind._ungrouped.__name__ if issubclass(kind, Grouped) else kind.__name__


def _kind_of(leaves: Sequence[Any], spec: Any, as_if: type | None = None) -> tuple[Any, ...] | None:
    """What a graph takes for given about inputs beside their sizes; None for inputs that are not traced."""
    found: list[Any] = []
    for leaf in leaves:
        kind = as_if if as_if is not None and isinstance(leaf, Tensor) else type(leaf)
        if kind in (Tensor, nn.Parameter) and leaf.layout is torch.strided:
            found.append((leaf.dim(), leaf.dtype, leaf.device, leaf.requires_grad))
        elif isinstance(leaf, _SIMPLE):
            found.append((type(leaf), leaf))
        else:
            return None
    return (active_group(None), torch.is_grad_enabled(), spec, found)


_SIMPLE = (int, float, str, type(None), torch.dtype, torch.device)


def _sizes(leaves: Sequence[Any]) -> list[Any]:
    return [(tuple(t.shape), t.stride()) for t in leaves if isinstance(t, Tensor)]


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
    layer: Any = node.meta.get("module")
    if type(layer) not in _JOINING or not layer.training or is_hooked(layer) or not set(node.kwargs) <= {"residual"}:
        return None
    x = node.args[0] if node.args else None
    value = x.meta["value"] if isinstance(x, fx.Node) else None
    return (id(layer.process_group), value.device) if isinstance(value, Tensor) else None
