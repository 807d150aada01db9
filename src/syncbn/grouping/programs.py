"""A schedule as a Python function."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx, nn

from syncbn.grouping.scheduling import Schedule, SharedMessage, Start, Step
from syncbn.nn.convert import SyncBatchNormAct
from syncbn.nn.sync_batch_norm import start_sync_batch_norm


def compiled(network: nn.Module, graph: fx.Graph, schedule: Schedule) -> Callable[..., list[Any]]:
    """The function that takes the graph's placeholders, and returns the list that is its output.

    Args:
        network: of which the graph is.
        graph: of `tracing.trace`.
        schedule: its order.
    """
    return _Writer(network, graph, schedule).function()


class _Writer:
    """Writes one statement for each step; objects that they use are global names."""

    def __init__(self, network: nn.Module, graph: fx.Graph, schedule: Schedule) -> None:
        self.network, self.steps = network, schedule.steps
        self.globals = dict[str, Any](start_sync_batch_norm=start_sync_batch_norm)
        self.names = {node: f"v{i}" for i, node in enumerate(graph.nodes)}
        self.known = dict[int, str]()
        self.placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        self.output = next(iter(reversed(graph.nodes)))

    def function(self) -> Callable[..., list[Any]]:
        lines = [f"def forward({', '.join(self.names[p] for p in self.placeholders)}):"]
        dead = self._dead_after()
        for i, step in enumerate(self.steps):
            lines += self._statements(i, step)
            lines += [f"{' = '.join(self.names[node] for node in dead[i])} = None"] if dead[i] else []
        lines.append(f"return {self._expression(self.output.args[0])}")
        source = "\n    ".join(lines)
        exec(compile(source, "<syncbn.group_messages>", "exec"), self.globals)
        return self.globals["forward"]

    def _dead_after(self) -> list[list[fx.Node]]:
        """For each step, the values that nobody needs after it."""
        last = dict[fx.Node, int]()
        for i, step in enumerate(self.steps):
            for node in _made_by(step):
                last.update(dict.fromkeys(node.all_input_nodes, i))
                last[node] = i
        dead: list[list[fx.Node]] = [[] for _ in self.steps]
        for node, i in last.items():
            if node not in self.output.all_input_nodes:
                dead[i].append(node)
        return dead

    def _statements(self, i: int, step: Step) -> list[str]:
        if isinstance(step, fx.Node):
            return [f"{self.names[step]} = {self._call(step)}"]
        message = step.message
        alone = len(message.layers) == 1 and not message.meanwhile
        if isinstance(step, Start):
            layers, inputs = self._layers(message), [self._expression(node.args[0]) for node in message.layers]
            pending = f"p{id(message)}"
            return [] if alone else [f"{pending} = start_sync_batch_norm([{layers}], [{', '.join(inputs)}])"]
        if alone:
            (node,) = message.layers
            return [f"{self.names[node]} = {self._call(node)}"]
        return self._finish(message)

    def _finish(self, message: SharedMessage) -> list[str]:
        residuals = [_residual(node) for node in message.layers]
        given = "" if not any(residuals) else f"[{', '.join(map(self._expression, residuals))}]"
        names = [self.names[node] for node in message.layers]
        pending = f"p{id(message)}"
        lines = [f"[{', '.join(names)}] = {pending}.finish({given})", f"{pending} = None"]
        for name, node in zip(names, message.layers, strict=True):
            layer = node.meta["module"]
            if isinstance(layer, SyncBatchNormAct):
                it = self._global(layer, "m")
                lines.append(f"{name} = {it}.act({it}.drop({name}))")
        return lines

    def _layers(self, message: SharedMessage) -> str:
        return ", ".join(self._global(node.meta["module"], "m") for node in message.layers)

    def _call(self, node: fx.Node) -> str:
        target: Any = node.target
        if node.op == "get_attr":
            owner, _, name = target.rpartition(".")
            return f"getattr({self._global(self.network.get_submodule(owner), 'm')}, {name!r})"
        args = [self._expression(a) for a in node.args]
        args += [f"{name}={self._expression(value)}" for name, value in node.kwargs.items()]
        if node.op == "call_method":
            return f"{args[0]}.{target}({', '.join(args[1:])})"
        called = self._global(node.meta["module"], "m") if node.op == "call_module" else self._global(target, "f")
        return f"{called}({', '.join(args)})"

    def _expression(self, a: Any) -> str:
        if isinstance(a, fx.Node):
            return self.names[a]
        if isinstance(a, tuple) and hasattr(a, "_fields"):
            return f"{self._global(type(a), 'c')}({', '.join(map(self._expression, a))})"
        if isinstance(a, tuple):
            return f"({''.join(self._expression(one) + ', ' for one in a)})"
        if isinstance(a, list):
            return f"[{', '.join(map(self._expression, a))}]"
        if isinstance(a, dict):
            return f"{{{', '.join(f'{self._expression(k)}: {self._expression(v)}' for k, v in a.items())}}}"
        if isinstance(a, slice):
            return f"slice({', '.join(map(self._expression, (a.start, a.stop, a.step)))})"
        if a is None or type(a) in (bool, int, str):
            return repr(a)
        return self._global(a, "c")

    def _global(self, it: Any, letter: str) -> str:
        name = self.known.get(id(it))
        if name is None:
            name = self.known[id(it)] = f"{letter}{len(self.known)}"
            self.globals[name] = it
        return name


def _made_by(step: Step) -> Sequence[fx.Node]:
    """The nodes whose inputs a step needs last."""
    if isinstance(step, fx.Node):
        return (step,)
    return step.message.layers


def _residual(node: fx.Node) -> Any:
    return node.args[1] if len(node.args) > 1 else node.kwargs.get("residual")
