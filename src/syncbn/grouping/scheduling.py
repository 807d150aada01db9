"""In which order a network's graph runs, so that its BatchNorm layers need few messages and seldom wait for one.

A layer's level is the number of its message. A layer that needs another's output comes at a later level, so the longest
chain of layers is the least number of levels, and grouping by the length of the chain before each layer reaches it.
Where a layer may as well come later, it does if that gives a message something to run beside: what leads to the layer
then runs while the message before its own travels.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from syncbn.grouping.tracing import UNKNOWN, storage_of


@dataclass
class SharedMessage:
    """Layers that share one.

    Attributes:
        level: its number; several of a level differ in their process group or device.
        layers: the calls of the layers, in the network's order.
        meanwhile: the nodes that run while it travels.
    """

    level: int
    layers: list[fx.Node]
    meanwhile: list[fx.Node] = field(default_factory=list)


@dataclass(frozen=True)
class Start:
    """A step: send the message."""

    message: SharedMessage


@dataclass(frozen=True)
class Finish:
    """A step: wait for the message and normalise."""

    message: SharedMessage


Step = fx.Node | Start | Finish


@dataclass(frozen=True)
class Schedule:
    """Steps in their order, the messages among them, and the least number of messages that the graph allows."""

    steps: list[Step]
    messages: list[SharedMessage]
    longest_chain: int


def schedule(graph: fx.Graph, key_of: Callable[[fx.Node], Hashable | None]) -> Schedule:
    """Order a graph.

    Args:
        graph: of `tracing.trace`.
        key_of: what calls of layers that share a message have in common; None for any other node.
    """
    nodes = [node for node in graph.nodes if node.op not in ("placeholder", "output")]
    keys = {node: key for node in nodes if (key := key_of(node)) is not None}
    order = _Order(nodes, keys)
    levels = order.levels()
    grouped = defaultdict[tuple[int, Hashable], list[fx.Node]](list)
    for node, level in levels.items():
        grouped[level, keys[node]].append(node)
    by_level = defaultdict[int, list[SharedMessage]](list)
    for (level, _), layers in sorted(grouped.items(), key=lambda item: item[0][0]):
        by_level[level].append(SharedMessage(level, layers))
    steps = order.steps(by_level)
    return Schedule(steps, [m for ms in by_level.values() for m in ms], max(order.depth.values(), default=0))


class _Order:
    """What comes after what."""

    def __init__(self, nodes: Sequence[fx.Node], layers: Iterable[fx.Node]) -> None:
        self.nodes, self.layers = nodes, set(layers)
        self.before = _dependencies(nodes, self.layers)  # of each node, those that must have run
        self.same = _calls_of_same_layer(nodes, self.layers)  # may not come earlier than that call
        self.depth = dict[fx.Node, int]()  # of each node, how many layers lie on the longest chain that ends with it
        for node in nodes:
            above = max((self.depth[b] for b in self.before[node]), default=0)
            if node in self.layers:
                above += 1
            self.depth[node] = max([above, *(self.depth[b] for b in self.same.get(node, ()))])

    def levels(self) -> dict[fx.Node, int]:
        """Of each layer. Later than need be only where a message would else have nothing beside it."""
        latest = self._latest()
        busy = set[int]()  # messages that something runs beside
        found = dict[fx.Node, int]()
        reached = dict[fx.Node, int]()  # of each node, the highest level before it
        for node in self.nodes:
            first = max((reached[b] for b in self.before[node]), default=0)
            reached[node] = first
            if node not in self.layers:
                continue
            own = self._has_own_work(node)
            level = first = max([first + 1, *(found[b] for b in self.same.get(node, ()))])
            if own:
                level = next((later for later in range(first + 1, latest[node] + 1) if later - 1 not in busy), first)
            if level > reached[node] + 1 and own:
                busy.add(level - 1)
            found[node] = reached[node] = level
        return found

    def _latest(self) -> dict[fx.Node, int]:
        """Of each layer, the last level at which it delays none of the longest chains."""
        end = max(self.depth.values(), default=0)
        latest = dict.fromkeys(self.nodes, end)  # of any node, the last level that may lie before it or be its own
        for node in reversed(self.nodes):
            for b in self.before[node]:
                latest[b] = min(latest[b], latest[node] - (node in self.layers))
            for b in self.same.get(node, ()):
                latest[b] = min(latest[b], latest[node])
        return latest

    def _has_own_work(self, layer: fx.Node) -> bool:
        """Whether something is computed for this layer alone."""
        return any(b not in self.layers and b.op.startswith("call") and len(b.users) == 1 for b in self.before[layer])

    def steps(self, by_level: dict[int, list[SharedMessage]]) -> list[Step]:
        """All nodes, each message started when its inputs are there and finished when what else can run has run."""
        steps: list[Step] = []
        done = set[fx.Node]()
        waiting = set(self.layers)  # those that have not finished

        def run(wanted: Iterable[fx.Node]) -> list[fx.Node]:
            known = dict[fx.Node, bool]()
            found = [n for n in self._needed(wanted, done) if not self._waits(n, waiting, known)]
            steps.extend(found)
            done.update(found)
            return found

        for level in sorted(by_level):
            messages = by_level[level]
            run(b for m in messages for layer in m.layers for b in self.before[layer])
            steps += [Start(m) for m in messages]
            coming = by_level.get(level + 1)
            wanted = self.nodes if coming is None else [b for m in coming for n in m.layers for b in self.before[n]]
            meanwhile = run(wanted)
            for m in messages:
                m.meanwhile = meanwhile
                steps.append(Finish(m))
                done.update(m.layers)
                waiting.difference_update(m.layers)
        run(self.nodes)
        assert len(done) == len(self.nodes)
        return steps

    def _needed(self, wanted: Iterable[fx.Node], done: set[fx.Node]) -> list[fx.Node]:
        """The nodes that these need, and they themselves, in the graph's order; no layers."""
        found, stack = set[fx.Node](), list(wanted)
        while stack:
            node = stack.pop()
            if node not in found and node not in done:
                found.add(node)
                stack += self.before[node]
        return [node for node in self.nodes if node in found and node not in self.layers]

    def _waits(self, node: fx.Node, waiting: set[fx.Node], known: dict[fx.Node, bool]) -> bool:
        """Whether a layer that has not finished comes before the node."""
        stack = [node]
        while stack:
            one = stack[-1]
            if one in known:
                stack.pop()
            elif one in waiting or any(known.get(b) for b in self.before[one]):
                known[one] = True
            elif left := [b for b in self.before[one] if b not in known]:
                stack += left
            else:
                known[one] = False
        return known[node]


def _dependencies(nodes: Sequence[fx.Node], layers: set[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Data, changes in place against reads of the same memory, and the order of what keeps it."""
    before = dict[fx.Node, list[fx.Node]]()
    known = set(nodes)
    writers, readers = dict[int, fx.Node](), defaultdict[int, list[fx.Node]](list)
    ordered: fx.Node | None = None
    stateful = dict[object, fx.Node]()
    for node in nodes:
        needs = dict.fromkeys(n for n in node.all_input_nodes if n in known)
        for storage in _memory_of(node):
            if storage in writers:
                needs[writers[storage]] = None
            if storage in node.meta["writes"]:
                needs.update(dict.fromkeys(readers.pop(storage, [])))
                writers[storage] = node
            readers[storage].append(node)
        if node.meta["ordered"]:
            if ordered is not None:
                needs[ordered] = None
            ordered = node
        if (
            (module := node.meta.get("module")) is not None
            and node not in layers
            and any(True for _ in module.buffers())
        ):
            if module in stateful:
                needs[stateful[module]] = None
            stateful[module] = node
        needs.pop(node, None)
        before[node] = list(needs)
    return before


def _memory_of(node: fx.Node) -> set[int]:
    """The storages that a node reads, or may."""
    found = set(node.meta["writes"])
    for source in node.all_input_nodes:
        value = source.meta["value"]
        found |= source.meta["writes"] if value is UNKNOWN else storages(value)
    return found


def storages(value: object) -> set[int]:
    """Of the tensors in a value."""
    return {storage_of(leaf) for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)}


def _calls_of_same_layer(nodes: Sequence[fx.Node], layers: set[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Of a layer that was called before, the call before: its moving averages are updated in their order."""
    last, found = dict[object, fx.Node](), dict[fx.Node, list[fx.Node]]()
    for node in nodes:
        if node in layers:
            module = node.meta["module"]
            if module in last:
                found[node] = [last[module]]
            last[module] = node
    return found
