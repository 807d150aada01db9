"""What a layer keeps of forwards that an activation checkpoint may run again: nothing once none can."""

import gc
import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ranks import run_ranks
from syncbn import SyncBatchNorm
from syncbn.functional.memory import Memory

C, FORWARDS = 256, 20


held = []  # graphs


def bytes_alive():
    """Of all tensors."""
    gc.collect()
    found = {id(o): o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)}
    return sum(t.numel() * t.element_size() for t in found.values())


def batch():
    return torch.ones(4, C).cumsum(0).requires_grad_()


def without_gradients(layer, x):
    with torch.no_grad():
        layer(x)


def in_inference_mode(layer, x):
    with torch.inference_mode():
        layer(x)


def without_gradients_in_eval_after(layer, x):
    without_gradients(layer, x)
    layer.eval()(x)
    layer.train()


def teacher_within_a_checkpoint(layer, x, reentrant):
    def block(x):
        without_gradients(layer, x)
        in_inference_mode(layer, x)
        return x.sin()

    checkpoint(block, x, use_reentrant=reentrant).sum().backward()


def checkpointed_without_gradients(layer, x, reentrant):
    with torch.no_grad():
        checkpoint(layer, x, use_reentrant=reentrant)


def backward_done(layer, x, reentrant):
    loss = checkpoint(layer, x, use_reentrant=reentrant, preserve_rng_state=False).sum()
    loss.backward()
    held.append(loss.grad_fn)


def backward_done_without_a_checkpoint(layer, x):
    loss = layer(x).sum()
    loss.backward()
    held.append(loss.grad_fn)


def loss_dropped(layer, x, reentrant):
    checkpoint(layer, x, use_reentrant=reentrant)


def exception(layer, x, reentrant):
    def block(x):
        raise KeyError(layer(x).shape)

    with pytest.raises(KeyError):
        checkpoint(block, x, use_reentrant=reentrant)


def offloaded(layer, x):
    with torch.autograd.graph.save_on_cpu():
        loss = layer(x).sum()
    loss.backward()


NOTHING = [without_gradients, in_inference_mode, without_gradients_in_eval_after, offloaded]
NOTHING_AFTER_CHECKPOINTS = [
    teacher_within_a_checkpoint,
    checkpointed_without_gradients,
    backward_done,
    loss_dropped,
    exception,
]


class RunsUnseen(torch.autograd.Function):
    """A checkpoint of somebody's own, whose forward has no ctx."""

    @staticmethod
    def forward(x, layer):
        return layer(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])
        ctx.layer = inputs[1]

    @staticmethod
    def backward(ctx, dy):
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            return torch.autograd.grad(ctx.layer(x), x, dy)[0], None


def in_a_checkpoint_unseen(layer):
    x = batch()
    return lambda: RunsUnseen.apply(x, layer)


def in_hooks_that_live_on(layer):
    x, hooks = batch(), torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)

    def step():
        with hooks:
            layer(x).sum().backward()
            without_gradients(layer, x)

    return step


BOUNDED = [in_a_checkpoint_unseen, in_hooks_that_live_on]


def growth(run):
    """Bytes more after many runs than after two, which make what stays: gradients, the last two messages."""
    run(), run()
    before = bytes_alive()
    for _ in range(FORWARDS):
        run()
    return bytes_alive() - before


def everything_kept(rank):
    x, found = batch(), {}
    warnings.simplefilter("ignore")
    loss_dropped(SyncBatchNorm(C), x, True)  # imports what checkpoints need
    gc.collect()
    gc.freeze()  # what there is already need not be looked through
    for use in NOTHING:
        found[use.__name__] = growth(partial(use, SyncBatchNorm(C), x))
    for use in NOTHING_AFTER_CHECKPOINTS:
        for reentrant in (True, False):
            found[f"{use.__name__}, {reentrant=}"] = growth(partial(use, SyncBatchNorm(C), x, reentrant))
    for use in BOUNDED:
        found[use.__name__] = growth(use(SyncBatchNorm(C)))
    without = growth(partial(backward_done_without_a_checkpoint, SyncBatchNorm(C), x))
    for reentrant in (True, False):
        found[f"{backward_done.__name__}, {reentrant=}"] -= 0 if reentrant else without
    gc.unfreeze()
    return found


@pytest.mark.parametrize("P", [1, 2])
def test_what_is_kept(P):
    found = everything_kept(0) if P == 1 else run_ranks(everything_kept, P, timeout=200)[1]
    most = Memory.MOST_WITHOUT_GRAPH * (16 * (2 * C + 3) + 8 if P > 1 else 16 * C + 8)
    for use in BOUNDED:
        assert 0 < found.pop(use.__name__) <= most
    assert found == dict.fromkeys(found, 0)


def kept_of_messages(rank):
    layer, x = SyncBatchNorm(C), batch()
    before = bytes_alive()
    for _ in range(3):
        without_gradients(layer, x)
    return bytes_alive() - before


def test_nothing_is_kept_of_a_message_that_has_come():
    assert max(run_ranks(kept_of_messages, 2)) < 8 * C  # half of one


def test_more_unseen_forwards_than_are_kept_are_told():
    step = in_a_checkpoint_unseen(SyncBatchNorm(C))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(Memory.MOST_WITHOUT_GRAPH):
            step()
    with pytest.warns(UserWarning, match=f"more than {Memory.MOST_WITHOUT_GRAPH} .*torch.utils.checkpoint"):
        step()


class Block(nn.Module):
    """A layer whose own backward comes before others' in the block, in saved-tensor hooks of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(3, 3).double(), SyncBatchNorm(3).double()

    def forward(self, x):
        h = self.first(x).sin()
        with torch.autograd.graph.save_on_cpu():
            y = self.norm(h)
        return y, h.exp().sin()


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("both_at_once", [False, True])
def test_a_block_is_repeated_after_the_layers_part_of_the_graph_is_gone(both_at_once, frozen):
    torch.manual_seed(0)
    block, x = Block(), torch.randn(5, 3, dtype=torch.float64)
    block.norm.requires_grad_(not frozen)
    found = []
    for checkpointed in (False, True):
        block.zero_grad()
        y, z = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
        if both_at_once:
            (y + z).pow(3).sum().backward()
        else:
            y.pow(3).sum().backward(retain_graph=True)
            del y
            z.pow(3).sum().backward()
        found.append([p.grad.clone() for p in block.parameters() if p.requires_grad])
    torch.testing.assert_close(*found)
    assert block.norm.num_batches_tracked == 2


def retained(reentrant, nested):
    layer, x = SyncBatchNorm(3).double(), torch.randn(4, 3, dtype=torch.float64, requires_grad=True)

    def block(x):
        return checkpoint(layer, x.sin(), use_reentrant=reentrant) if nested else layer(x.sin())

    y = checkpoint(block, x, use_reentrant=reentrant).pow(3).sum()
    y.backward(retain_graph=True)
    first, x.grad = x.grad, None
    y.backward()
    assert torch.equal(x.grad, first)
    return layer.num_batches_tracked.item()


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of the inner checkpoint's
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_a_retained_graph_is_run_again(reentrant, nested):
    assert retained(reentrant, nested) == 1


def one_rank_repeats_itself_and_goes_backward_from_the_start(rank):
    """As a pipeline does; rank 0 has the same local sums in both, not the same statistics."""
    found = []
    for checkpointed in (False, True):
        layer = SyncBatchNorm(3).double()
        xs = [torch.ones(4, 3).cumsum(0).double().pow(1 + step * rank).requires_grad_() for step in range(2)]
        ys = [checkpoint(layer, x, use_reentrant=True) if checkpointed else layer(x) for x in xs]
        for y in ys:
            y.pow(3).sum().backward()
        found.append([x.grad for x in xs])
    torch.testing.assert_close(*found)


def test_a_reentrant_checkpoint_repeats_its_own_forwards():
    run_ranks(one_rank_repeats_itself_and_goes_backward_from_the_start, 2)
