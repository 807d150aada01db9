"""Selective activation checkpointing: whatever a policy keeps, gradients, averages and messages of no checkpoint."""

import random
from functools import partial
from unittest import mock

import pytest
import torch
from norm_cases import relative
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from traffic import Traffic

import syncbn
from ranks import run_ranks
from syncbn import SyncBatchNorm
from syncbn.models import inception_bn
from syncbn.nn import start_sync_batch_norm
from syncbn.ops import native
from syncbn.recomputing import unseen_by_selective_checkpoints


def keeps(wanted):
    """The policy that keeps the results of the operators that are wanted."""

    def policy(context, operator, *args, **kwargs):
        keep, again = CheckpointPolicy.MUST_SAVE, CheckpointPolicy.PREFER_RECOMPUTE
        return keep if wanted(str(operator.overloadpacket)) else again

    return policy


POLICIES = {
    "nothing": keeps(lambda name: False),
    "convolutions": keeps(lambda name: name in ("aten.convolution", "aten.addmm")),
    "everything": keeps(lambda name: True),
    "reductions": keeps(lambda name: "c10d" in name or "sum" in name),
    **{f"subset {i}": keeps(lambda name, i=i: random.Random(f"{i} {name}").random() < 0.5) for i in range(4)},
}


class Alone(nn.Module):
    """One layer after another, the last with a residual."""

    def __init__(self):
        super().__init__()
        self.first, self.last = SyncBatchNorm(6, activation="relu"), SyncBatchNorm(6, activation="relu")
        self.convolution = nn.Conv2d(6, 6, 3, padding=1)

    def forward(self, x):
        x = self.first(x)
        return self.last(self.convolution(x), x).sin()


class Group(nn.Module):
    """Layers in one message, of which two in one input, with work while it travels."""

    def __init__(self):
        super().__init__()
        self.wide, self.narrow = SyncBatchNorm(6), nn.ModuleList([SyncBatchNorm(2), SyncBatchNorm(4)])
        self.convolution = nn.Conv2d(6, 6, 1)

    def forward(self, x):
        pending = start_sync_batch_norm([self.wide, list(self.narrow)], [x, self.convolution(x)])
        meanwhile = x.cos()
        x, y = pending.finish([meanwhile, None])
        return torch.cat([x * y, meanwhile], 1)


class Evaluated(Alone):
    """A layer that is fine-tuned by its moving averages, beside one that is not."""

    def train(self, mode=True):
        super().train(mode)
        self.first.eval()
        return self


def inception_module():
    return inception_bn(2, stem="small", width_multiplier=0.125).inception_3a


BLOCKS = {"alone": (Alone, 6), "group": (Group, 6), "evaluated": (Evaluated, 6), "inception": (inception_module, 24)}


def step(make, channels, rank, P, policy=None):
    """Gradients and buffers of two steps, and the messages sent."""
    torch.manual_seed(0)
    block = make().double().train()
    for parameter in block.parameters():
        nn.init.uniform_(parameter, -0.5, 1)
    whole = torch.randn(4, channels, 3, 3, generator=torch.Generator().manual_seed(1)).double()
    x = whole[rank * 4 // P : (rank + 1) * 4 // P].requires_grad_()
    contexts = partial(create_selective_checkpoint_contexts, policy)
    with Traffic() as sent:
        for _ in range(2):
            y = block(x) if policy is None else checkpoint(block, x, use_reentrant=False, context_fn=contexts)
            y.pow(3).sum().backward()
    return [x.grad, *(p.grad for p in block.parameters()), *block.buffers()], sent.count


def differences(rank, P, policies=POLICIES):
    """Cases whose numbers are not those of no checkpoint to rounding, or that sent other messages."""
    found = []
    for block, case in BLOCKS.items():
        expected, sent = step(*case, rank, P)
        scale = max(t.abs().max().item() for t in expected)
        for name in policies:
            tensors, count = step(*case, rank, P, POLICIES[name])
            error = max(relative(a, b, 1e-3 * scale) for a, b in zip(tensors, expected, strict=True))
            found += [(block, name, error, count, sent)] if error > 1e-12 or count != sent else []
    return found


def on_a_rank(rank):
    found = differences(rank, 2, ["nothing", "everything", "subset 0"])
    with mock.patch.object(native, "takes", lambda x: False):
        found += differences(rank, 2, ["subset 1"])
    with syncbn.recompute_activations():
        return found + differences(rank, 2, ["convolutions"])


def test_any_policy_over_ranks():
    assert run_ranks(on_a_rank, 2, timeout=180) == [[], []]


def test_any_policy_alone():
    assert differences(0, 1) == []
    with syncbn.recompute_activations():
        assert differences(0, 1, ["convolutions", "everything"]) == []


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.append(str(func.overloadpacket))
        return func(*args, **(kwargs or {}))


def test_modes_of_others_see_the_layer_and_stay_in_place():
    """Also beneath a checkpoint's, and after an error."""
    forward, _ = create_selective_checkpoint_contexts(POLICIES["everything"])
    with FakeTensorMode(allow_non_fake_inputs=True), Seen() as below, forward, Seen() as above:
        before = _get_current_dispatch_mode_stack()
        with pytest.raises(ZeroDivisionError), unseen_by_selective_checkpoints():
            assert _get_current_dispatch_mode_stack() == [mode for mode in before if mode is not forward]
            torch.ones(2).sin()
            raise ZeroDivisionError
        assert _get_current_dispatch_mode_stack() == before
        assert len(before) == 4
    assert below.operators == above.operators == ["aten.ones", "aten.sin"]
