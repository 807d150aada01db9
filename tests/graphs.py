"""What torch.compile makes of a network: its graphs run as traced, and the collectives in each are counted."""

from collections.abc import Callable
from typing import Any


def counting_backend(counts: list[int]) -> Callable[..., Any]:
    """Runs the traced graphs as they are, and notes the all-reduces in each: forward first, then backward."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd

    def compiler(graph: Any, example_inputs: Any) -> Any:
        counts.append(sum("all_reduce" in str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph.forward)

    return aot_autograd(fw_compiler=compiler, bw_compiler=compiler)
