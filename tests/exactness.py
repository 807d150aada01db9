"""How exact results have to be: the same on every machine, whatever its vectors and kernels. See CONTRIBUTING.md."""

import torch

TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 8 * torch.finfo(torch.float32).eps,
    torch.bfloat16: torch.finfo(torch.bfloat16).eps,
    torch.float16: torch.finfo(torch.float16).eps,
}
"""Of what is computed from exact sums, relative to the largest element.

In float32 it goes through five operations, each of which rounds by eps / 2 of numbers that may be some times larger;
a result of fewer bits is one of float32, rounded once by eps / 2.
"""


def allowed(stock_error: float) -> float:
    """Of an algorithm that itself sums in float32: at most twice the error of stock layers in the same dtype."""
    return max(TOLERANCE[torch.float32], 2 * stock_error)
