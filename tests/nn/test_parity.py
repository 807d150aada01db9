"""What `nn.BatchNorm*d` takes, the layer takes: side by side with it, in one process and on two ranks.

PyTorch's own list of its BatchNorm modules' arguments and inputs, every way to make a layer, tensors of every kind, and
what programs do with outputs. A rank has half of the batch; plain layers have all of it. All in float64.
"""

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrize, prune, skip_init

from exactness import TOLERANCE
from ranks import run_ranks
from syncbn import SyncBatchNorm, convert_sync_batchnorm

with warnings.catch_warnings(action="ignore"):  # of what else they can be used with
    from torch.testing._internal.common_modules import module_db
# The import forbids the whole process to set the flags of backends; other tests do.
torch.backends.disable_global_flags.__globals__["__allow_nonbracketed_mutation_flag"] = True

C = 4
MODULES = {nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d}


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def mine(x):
    """This rank's part of a batch, a leaf."""
    P, rank = world_size(), dist.get_rank() if dist.is_initialized() else 0
    return x.detach().chunk(P)[rank].clone().requires_grad_(x.requires_grad)


def as_one(x):
    """What the ranks have of a batch, together."""
    if world_size() == 1:
        return x.detach()
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def over_ranks(gradient):
    gradient = gradient.detach().clone()
    if world_size() > 1:
        dist.all_reduce(gradient)
    return gradient


def results(layer, x, y):
    """Of a step on this rank's part: output, gradients of the input and the parameters, and the buffers."""
    parameters = {f"d{name}": over_ranks(p.grad) for name, p in layer.named_parameters() if p.grad is not None}
    dx = {} if x.grad is None else {"dx": as_one(x.grad)}
    buffers = {name: b.detach().clone() for name, b in layer.named_buffers()}
    if x.numel() == 0:  # which plain BN counts as a step
        buffers.pop("num_batches_tracked", None)
    return {"y": as_one(y), **dx, **parameters, **buffers}


def step(layer, x):
    y = layer(x)
    (y.sin() * y).sum().backward()
    return results(layer, x, y)


# --- arguments and inputs that PyTorch lists


def listed():
    """(module class, its arguments, the input, training) of torch's BatchNorm modules, under a name."""
    for info in module_db:
        if info.module_cls not in MODULES:
            continue
        for training in (True, False):
            torch.manual_seed(0)
            inputs = info.module_inputs_func(info, "cpu", torch.float64, requires_grad=True, training=training)
            for one in inputs:
                name = f"{info.module_cls.__name__} {one.desc or 'plain'} {'train' if training else 'eval'}"
                yield name, (info.module_cls, one.constructor_input, one.forward_input, training)


LISTED = dict(listed())


def step_of_listed(name, kind=None):
    cls, constructor, forward, training = LISTED[name]
    layer = (kind or cls)(*constructor.args, **constructor.kwargs).double().train(training)
    (x,) = forward.args
    if kind is None:
        return step(layer, x.detach().clone().requires_grad_())
    return step(layer, mine(x))


# --- ways to make a layer


def meta(norm):
    with torch.device("meta"):
        layer = norm(C)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    return layer.double()


def of_default_dtype(norm):
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return norm(C)
    finally:
        torch.set_default_dtype(before)


def skipped(norm):
    layer = skip_init(norm, C, dtype=torch.float64)
    layer.reset_parameters()
    return layer


class Doubled(nn.Module):
    def forward(self, x):
        return 2 * x


def parametrized(norm):
    layer = norm(C).double()
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


def pruned(norm):
    layer = norm(C).double()
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    return prune.l1_unstructured(layer, "weight", amount=1)


def lazy(norm):
    layer = nn.LazyBatchNorm1d(dtype=torch.float64)
    layer(torch.zeros(2, C, dtype=torch.float64))
    layer.reset_running_stats()
    return layer if norm is nn.BatchNorm1d else convert_sync_batchnorm(layer)


def in_functional_call(norm):
    return Called(norm(C).double())


class Called(nn.Module):
    """Runs its layer with other tensors in the place of its own."""

    def __init__(self, layer):
        super().__init__()
        self.inner = layer
        self.weight = nn.Parameter(torch.linspace(0.5, 2, C, dtype=torch.float64))

    def forward(self, x):
        return torch.func.functional_call(self.inner, {"weight": self.weight}, (x,))


def deepcopied(norm):
    return copy.deepcopy(norm(C).double())


def pickled(norm):
    return pickle.loads(pickle.dumps(norm(C).double()))


def negative_momentum(norm):
    return _set(norm(C).double(), momentum=-0.1)


def running_mean_of_other_memory(norm):
    layer = norm(C).double()
    layer.running_mean = torch.zeros(2 * C, dtype=torch.float64)[::2]
    layer.num_batches_tracked = torch.tensor(0, dtype=torch.int32)
    return layer


def no_statistics(norm):
    return _set(norm(C).double(), running_mean=None, running_var=None, num_batches_tracked=None)


def _set(layer, **attributes):
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


MADE: list[Callable] = [
    meta,
    of_default_dtype,
    skipped,
    parametrized,
    pruned,
    lazy,
    in_functional_call,
    deepcopied,
    pickled,
    negative_momentum,
    running_mean_of_other_memory,
    no_statistics,
]


# --- tensors


class Seen(torch.Tensor):
    """Of `__torch_function__`: everything made of it is one, too."""


class Wrapped(torch.Tensor):
    """Of `__torch_dispatch__`: holds another tensor, and sees every operator."""

    @staticmethod
    def __new__(cls, held):
        options = {"strides": held.stride(), "dtype": held.dtype, "device": held.device}
        return torch.Tensor._make_wrapper_subclass(cls, held.shape, **options)

    def __init__(self, held):
        self.held = held

    @classmethod
    def __torch_dispatch__(cls, operator, types, arguments=(), options=None):
        hold = torch.utils._pytree.tree_map_only(cls, lambda t: t.held, (arguments, options or {}))
        result = operator(*hold[0], **hold[1])
        return torch.utils._pytree.tree_map_only(torch.Tensor, cls, result)


def subclass(layer, x):
    y = layer(x.as_subclass(Seen))
    assert type(y) is Seen
    return y.as_subclass(torch.Tensor)


class Unwrap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.held

    @staticmethod
    def backward(ctx, dy):
        return Wrapped(dy)


class Wrap(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return Wrapped(x)

    @staticmethod
    def backward(ctx, dy):
        return dy.held


def wrapper(layer, x):
    y = layer(Wrap.apply(x))
    assert type(y) is Wrapped
    return Unwrap.apply(y)


def turned(layer, x):
    return layer(x.t().contiguous().t())


def negated_when_read(layer, x):
    return layer(torch._neg_view(x))


def expanded(layer, x):
    return layer(x[:, :1].expand(-1, C))


def cut_out(layer, x):
    return layer(torch.cat([x, x], 1)[:, 1 : 1 + C])


# --- what programs do with outputs


def changed_in_place(layer, x):
    return layer(x).mul_(3).relu_()


def replaced_gradient(layer, x):
    y = layer(x)
    y.register_hook(lambda g: g.clamp(-0.1, 0.1))
    return y


def hooked_module(layer, x):
    handle = layer.register_full_backward_hook(lambda module, dx, dy: (2 * dx[0],))
    y = layer(x)
    handle.remove()
    return y


def hooked_parameter(layer, x):
    layer.weight.register_hook(lambda g: 2 * g)
    return layer(x)


def twice(layer, x):
    return layer(layer(x).sigmoid())


def of_inference(layer, x):
    """An input made in inference mode, as a constant."""
    with torch.inference_mode():
        constant = x.detach() * 2
    with torch.no_grad():
        y = layer(constant)
    return y + 0 * layer(x)


DONE: list[Callable] = [
    subclass,
    wrapper,
    turned,
    negated_when_read,
    expanded,
    cut_out,
    changed_in_place,
    replaced_gradient,
    hooked_module,
    hooked_parameter,
    twice,
    of_inference,
]


def batch():
    return torch.randn(8, C, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()


def step_of_made(make, norm):
    x = batch() if norm is nn.BatchNorm1d else mine(batch())
    return step(make(norm), x)


def step_of_done(do, norm):
    x = batch() if norm is nn.BatchNorm1d else mine(batch())
    layer = norm(C).double()
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(0))
    y = do(layer, x)
    (y.sin() * y).sum().backward()
    return results(layer, x, y)


def batched_gradients(norm):
    """Of several outputs' gradients at once."""
    x = batch() if norm is nn.BatchNorm1d else mine(batch())
    layer = norm(C).double()
    y = layer(x)
    dys = torch.eye(C, dtype=torch.float64)[:, None].expand(C, *y.shape).contiguous() * y.detach().sin()
    dx, dweight = torch.autograd.grad(y, [x, layer.weight], dys, is_grads_batched=True)
    return {"dx": as_one(dx.transpose(0, 1).contiguous()), "dweight": over_ranks(dweight)}


CASES = {
    **{name: lambda norm, name=name: step_of_listed(name, norm if norm is SyncBatchNorm else None) for name in LISTED},
    **{make.__name__: lambda norm, make=make: step_of_made(make, norm) for make in MADE},
    **{do.__name__: lambda norm, do=do: step_of_done(do, norm) for do in DONE},
    "batched_gradients": batched_gradients,
}


def attempt(run, norm):
    """The results, or the error's type and text."""
    try:
        return run(norm)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def every_case(_rank):
    return {name: attempt(run, SyncBatchNorm) for name, run in CASES.items()}


@cache
def plain(name):
    return attempt(CASES[name], nn.BatchNorm1d)


@pytest.fixture(scope="module")
def world():
    return run_ranks(every_case, 2, timeout=120)


def assert_same(found, expected, name):
    assert not isinstance(found, str) and not isinstance(expected, str), f"{name}: {found} where plain BN: {expected}"
    assert found.keys() == expected.keys(), name
    for key, one in expected.items():
        scale = max(1.0, float(one.abs().max())) if one.numel() else 1.0
        assert found[key].shape == one.shape, (name, key)
        error = float((found[key].double() - one.double()).abs().max()) / scale if one.numel() else 0.0
        assert error <= TOLERANCE[torch.float64], (name, key, error)


def test_torch_lists_each_of_its_modules():
    assert {cls for cls, *_ in LISTED.values()} == MODULES
    assert len(LISTED) >= 40


@pytest.mark.parametrize("name", CASES)
def test_alone(name):
    assert_same(attempt(CASES[name], SyncBatchNorm), plain(name), name)


ALONE_IN_EVAL = [name for name in CASES if "not_tracking_stats eval" in name]  # as torch.nn.SyncBatchNorm


@pytest.mark.parametrize("name", [name for name in CASES if name not in ALONE_IN_EVAL])
def test_on_two_ranks(world, name):
    for found in world:
        assert_same(found[name], plain(name), name)


@pytest.mark.parametrize("name", ALONE_IN_EVAL)
def test_in_eval_mode_without_averages_each_rank_is_alone(world, name):
    cls, constructor, forward, _ = LISTED[name]
    layer = cls(*constructor.args, **constructor.kwargs).double().eval()
    halves = [step(layer, half.detach().requires_grad_()) for half in forward.args[0].chunk(2)]
    for found in world:
        for key in ("y", "dx"):
            expected = torch.cat([half[key] for half in halves])
            assert_same({key: found[name][key]}, {key: expected}, name)
