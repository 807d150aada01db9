"""What torch.jit.script compiles in the place of a layer's forward: plain batch normalisation of this rank's batch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def scripted_batch_norm(
    input: Tensor,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    uses_batch: bool,
    momentum: float,
    eps: float,
) -> Tensor:
    """Normalise as `BatchNorm` does, in operators that TorchScript knows.

    Args:
        input: (N, C, ...), floating point.
        residual: like input, added, or None.
        running_mean: (C), or None.
        running_var: (C), or None.
        weight: (C), or None.
        bias: (C), or None.
        uses_batch: normalise by the batch, and update the running statistics where they are given.
        momentum: of that update.
        eps: added to the variance.

    Returns:
        Like input.
    """
    if residual is not None and residual.shape != input.shape:
        raise ValueError("the residual must have the size of the input")
    wide = torch.float64 if input.dtype == torch.float64 else torch.float32
    mean = None if running_mean is None else running_mean.to(wide)
    var = None if running_var is None else running_var.to(wide)
    y = F.batch_norm(
        input.to(wide) if input.device.type == "cpu" else input,  # where ATen knows no mixture of dtypes
        mean,
        var,
        None if weight is None else weight.to(wide),
        None if bias is None else bias.to(wide),
        uses_batch,
        momentum,
        eps,
    )
    if uses_batch and mean is not None and running_mean is not None and running_mean.dtype != wide:
        running_mean.copy_(mean)
    if uses_batch and var is not None and running_var is not None and running_var.dtype != wide:
        running_var.copy_(var)
    if residual is not None:
        y = y + residual
    return y.to(input.dtype)
