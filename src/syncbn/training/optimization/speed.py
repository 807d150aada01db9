"""What makes a training step faster and leaves its numbers as they are, but for rounding; chosen by the device."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from syncbn import ops

CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


def use_fused_optimizer(wanted: bool | None, parameters: Iterable[Tensor], trainer: Trainer) -> bool | None:
    """Whether the optimiser updates all parameters in one kernel.

    Args:
        wanted: True or False; None for True where all parameters lie whole on CUDA devices and gradients are not
            clipped under autocast, which Lightning refuses to do for a fused optimiser.
        parameters: all that the optimiser updates.
        trainer: whose gradient clipping counts.

    Returns:
        What `torch.optim.SGD(fused=)` takes: True, or None to leave the choice to torch.

    Raises:
        ValueError: True was asked for, and gradients are clipped under autocast.
    """
    clips = bool(trainer.gradient_clip_val) and "mixed" in str(trainer.precision)
    if wanted and clips:
        raise ValueError(
            f"model.fused_optimizer=true contradicts trainer.gradient_clip_val={trainer.gradient_clip_val} with"
            f" trainer.precision={trainer.precision}: leave one of them out"
        )
    if wanted is None:
        wanted = not clips and all(p.is_cuda and type(p.data) is Tensor for p in parameters)
    return True if wanted else None


def compile_network(network: nn.Module, mode: CompileMode | None, device: torch.device) -> None:
    """Have `torch.compile` make one graph of the network, in place; its state_dict stays the same.

    Args:
        network: to compile at its next call; None as mode leaves it alone.
        mode: of `torch.compile`. "reduce-overhead" and "max-autotune" replay CUDA graphs of forward and backward, which
            pays where batches are small.
        device: where it runs.

    Raises:
        ValueError: the mode needs a GPU and this is none.
    """
    if mode is None:
        return
    if mode in WITH_CUDA_GRAPHS and device.type != "cuda":
        raise ValueError(
            f"model.compile={mode} replays CUDA graphs, and the device is a {device.type}: use default, or leave it out"
        )
    import torch._dynamo.config as dynamo_config  # which takes seconds to import

    dynamo_config.optimize_ddp = False  # it would cut the graph in pieces, and fails at our all-reduce
    if mode in WITH_CUDA_GRAPHS:
        ops.prepare(device)
    network.compile(fullgraph=True, mode=mode)


def use_recomputation(wanted: bool | None, device: torch.device) -> bool:
    """Whether the backward recomputes activations rather than keeping them; where nobody says, on CUDA devices."""
    return device.type == "cuda" if wanted is None else wanted


def default_precision(options: Any) -> str | None:
    """Lightning's precision where none is given: bfloat16 autocast on GPUs that know it, else None, Lightning's own.

    Args:
        options: the trainer's, by name.
    """
    if options.get("precision") is not None or options.get("plugins"):
        return options.get("precision")
    return "bf16-mixed" if _on_gpu(options) and torch.cuda.is_bf16_supported(including_emulation=False) else None


def default_benchmark(options: Any) -> bool | None:
    """Whether cuDNN tries its convolutions out and takes the fastest; where nobody says, on GPUs.

    Not where runs are to be deterministic: another run might take another one.

    Args:
        options: the trainer's, by name.
    """
    if options.get("benchmark") is not None or options.get("deterministic"):
        return options.get("benchmark")
    return True if _on_gpu(options) else None


def _on_gpu(options: Any) -> bool:
    return options.get("accelerator") in ("auto", "gpu", "cuda") and torch.cuda.is_available()
