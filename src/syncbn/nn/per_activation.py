"""Batch normalisation with statistics per activation rather than per feature map."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from syncbn.nn.checks import check_dense, check_residual
from syncbn.nn.sync_batch_norm import SyncBatchNorm


class PerActivationBatchNorm(SyncBatchNorm):
    """Normalises each activation (c, h, w) by its own mean and variance over the batch, across ranks.

    What the paper does in fully connected layers (section 3.2: one gamma and beta per activation), and in the last
    hidden layers of some members of its ensemble (section 4.2.3, "non-convolutional").

    Args:
        normalized_shape: of one sample, such as (C, H, W); parameters and statistics are flat, C*H*W long.
        eps: as in `SyncBatchNorm`, like the rest.
        momentum: see there.
        affine: see there.
        track_running_stats: see there.
        process_group: see there.
        activation: see there.
        device: see there.
        dtype: see there.

    Raises:
        ValueError: an argument out of range; in forward, samples of another shape.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: dist.ProcessGroup | None = None,
        *,
        activation: str | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (normalized_shape,) if isinstance(normalized_shape, int) else tuple(normalized_shape)
        if not shape or min(shape) < 1:
            raise ValueError(f"normalized_shape must hold sizes of 1 or more, got {normalized_shape}")
        super().__init__(
            math.prod(shape),
            eps,
            momentum,
            affine,
            track_running_stats,
            process_group,
            activation=activation,
            device=device,
            dtype=dtype,
        )
        self.normalized_shape = shape

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Normalise input (N, *normalized_shape); the residual is like it."""
        if torch.jit.is_scripting():
            if input.shape[1:] != self.normalized_shape:
                raise ValueError("the input's samples are not of the layer's normalized_shape")
            flat = None if residual is None else residual.flatten(1)
            return self._scripted(input.flatten(1), flat).view(input.shape)
        else:
            return self._normalized(input, residual)

    def _normalized(self, input: Tensor, residual: Tensor | None) -> Tensor:
        check_dense(input, "input")
        if not torch.jit.is_tracing() and tuple(input.shape[1:]) != self.normalized_shape:
            raise ValueError(
                f"expected samples of shape {self.normalized_shape}, got input of size {list(input.shape)}"
            )
        if residual is not None:
            check_dense(residual, "residual")
            check_residual(residual, input)
        flat = input.reshape(input.shape[0], self.num_features)
        output = super().forward(flat, None if residual is None else residual.reshape(flat.shape)).view(input.shape)
        if input.is_contiguous() or input.dim() not in (4, 5):
            return output
        layout = torch.channels_last if input.dim() == 4 else torch.channels_last_3d
        return output.contiguous(memory_format=layout) if input.is_contiguous(memory_format=layout) else output

    def extra_repr(self) -> str:
        """`SyncBatchNorm`'s, with the shape."""
        return f"{super().extra_repr()}, normalized_shape={self.normalized_shape}"
