"""What torch.compile makes of a network: its graphs run as traced, and the collectives in each are counted."""

from collections.abc import Callable
from typing import Any

import torch


def counting_backend(counts: list[int]) -> Callable[..., Any]:
    """Runs the traced graphs as they are, and notes the all-reduces in each: forward first, then backward."""
    return _noting_backend(lambda names: counts.append(sum("all_reduce" in name for name in names)))


def operators_backend(found: list[list[str]]) -> Callable[..., Any]:
    """The same, but notes the names of all operators in each, in order."""
    return _noting_backend(found.append)


def _noting_backend(note: Callable[[list[str]], None]) -> Callable[..., Any]:
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def compiler(graph: Any, example_inputs: Any) -> Any:
        note([str(node.target) for node in graph.graph.nodes if isinstance(node.target, torch._ops.OpOverload)])
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
