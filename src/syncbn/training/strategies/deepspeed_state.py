"""The state of an optimiser under DeepSpeed, in and out, as torch.optim.SGD has it in one process.

So a checkpoint is the same file under every strategy: it goes on under another one, and on another number of ranks.
DeepSpeed's own is a folder of pickles for one stage and number of ranks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

MOMENTUM = "momentum_buffer"
"""The only state of torch.optim.SGD."""


def parameters_of_groups(optimizer: torch.optim.Optimizer) -> list[list[nn.Parameter]]:
    """The parameters of each group; to be asked before DeepSpeed puts its flat buffers in their place.

    Raises:
        ValueError: It is another optimiser than torch.optim.SGD, whose state is not known here.
    """
    if type(optimizer) is not torch.optim.SGD:
        raise ValueError(
            f"checkpoints under DeepSpeed hold the state of torch.optim.SGD, not of {type(optimizer).__name__}:"
            " take SGD, or Lightning's own DeepSpeedStrategy"
        )
    return [list(group["params"]) for group in optimizer.param_groups]


def whole_weights(module: nn.Module) -> dict[str, Tensor]:
    """The state_dict of a module under DeepSpeed: whole tensors on the CPU, in float32 or wider.

    A collective in ZeRO 1 to 3.
    """
    state = {name: value.detach().cpu() for name, value in module.state_dict().items()}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        weight = whole_weight(parameter)  # a frozen one has no master copy
        state[name] = (weight.float() if weight.dtype in (torch.float16, torch.bfloat16) else weight).cpu()
    return state


def whole_weight(parameter: nn.Parameter) -> Tensor:
    """One parameter whole: its master copy where there is one. A collective in ZeRO 1 to 3."""
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters
    from deepspeed.utils import safe_get_full_fp32_param

    if parameter.requires_grad:
        master = safe_get_full_fp32_param(parameter)
        if master is not None:
            return master
    with GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        return parameter.detach().clone()


def optimizer_state(zero: Any, groups: Sequence[Sequence[nn.Parameter]]) -> dict[str, Any]:
    """The state_dict that torch.optim.SGD would have in one process. A collective.

    Args:
        zero: DeepSpeed's optimiser of ZeRO 1, 2 or 3.
        groups: From `parameters_of_groups`.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    inner = zero.optimizer
    has_momentum = any(MOMENTUM in values for values in inner.state.values())
    _link_momentum(zero)
    state: dict[int, dict[str, Tensor]] = {}
    packed = []
    place = 0
    for options, parameters in zip(inner.param_groups, groups, strict=True):
        places = list(range(place, place + len(parameters)))
        place += len(parameters)
        packed.append({**options, "params": places})
        if has_momentum:
            for number, parameter in zip(places, parameters, strict=True):
                state[number] = {MOMENTUM: safe_get_full_optimizer_state(parameter, MOMENTUM).cpu()}
    return {"state": state, "param_groups": packed}


def load_optimizer_state(zero: Any, groups: Sequence[Sequence[nn.Parameter]], saved: Mapping[str, Any]) -> None:
    """Restore what `optimizer_state`, or torch.optim.SGD's own state_dict, gave.

    Args:
        zero: DeepSpeed's optimiser of ZeRO 1, 2 or 3.
        groups: From `parameters_of_groups`.
        saved: The state.
    """
    inner = zero.optimizer
    _check_groups(groups, saved["param_groups"])
    for options, of_group in zip(inner.param_groups, saved["param_groups"], strict=True):
        options.update({key: value for key, value in of_group.items() if key != "params"})
    momenta = [values.get(MOMENTUM) for _, values in sorted(saved["state"].items())]
    if not momenta or any(momentum is None for momentum in momenta):
        return  # before the first step, or without momentum
    _make_momentum(zero)
    parameters = (parameter for group in groups for parameter in group)
    for parameter, momentum in zip(parameters, momenta, strict=True):
        set_whole(parameter, momentum, MOMENTUM)


def _check_groups(groups: Sequence[Sequence[nn.Parameter]], saved: Sequence[Mapping[str, Any]]) -> None:
    found, expected = [len(group["params"]) for group in saved], [len(group) for group in groups]
    if found != expected:
        raise ValueError(
            f"the checkpoint's optimiser has groups of {found} parameters, this run's {expected}: give it the same"
            " freeze, learning_rate_factors and weight decays"
        )


def _make_momentum(zero: Any) -> None:
    """Give the flat buffers a momentum, which SGD itself makes in its first step."""
    flats = zero.fp32_partitioned_groups_flat if _divides_weights(zero) else zero.single_partition_of_fp32_groups
    for flat in flats:
        zero.optimizer.state[flat][MOMENTUM] = torch.zeros_like(flat)
    _link_momentum(zero)


def _link_momentum(zero: Any) -> None:
    """Tell the parameters of ZeRO 1 and 2 where their momentum is.

    DeepSpeed does so after the first group's first step, when the momentum of the other groups is still to be made.
    """
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    if _divides_weights(zero):
        return
    for parameters, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        lazy_init_hp_params_optimizer_state(parameters, flat, zero.optimizer.state)


def _divides_weights(zero: Any) -> bool:
    """Whether it is ZeRO 3's optimiser."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    return isinstance(zero, DeepSpeedZeroOptimizer_Stage3)


def set_whole(parameter: nn.Parameter, value: Tensor, key: str | None = None) -> None:
    """Put this rank's part of a whole tensor into the master copy of a parameter, or into its optimiser state.

    Args:
        parameter: Trained under ZeRO 1, 2 or 3.
        value: Of the parameter's whole shape.
        key: Of the optimiser state; None for the master copy.
    """
    from deepspeed import comm
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    if hasattr(parameter, "ds_id"):  # ZeRO 3; its functions for whole tensors cannot cut a last, shorter part
        length = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
        start = comm.get_rank(group=parameter.ds_process_group) * length  # type: ignore[attr-defined]
        part = value.new_zeros(length)
        flat = value.flatten()[start : start + length]
        part[: len(flat)] = flat
        if key is None:
            safe_set_local_fp32_param(parameter, part)
        else:
            safe_set_local_optimizer_state(parameter, part, key)
    elif key is None:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, key)


def make_whole(module: nn.Module) -> None:
    """Put whole parameters in the place of those that ZeRO 3 has partitioned. A collective."""
    for owner in module.modules():
        whole = {
            name: parameter
            if parameter is None
            else nn.Parameter(whole_weight(parameter).to(parameter.dtype), parameter.requires_grad)
            for name, parameter in list(owner._parameters.items())
        }
        owner._parameters = whole
