"""Second derivatives: gradgradcheck in one process, a gradient penalty across ranks."""

import itertools

import pytest
import torch
from norm_cases import relative
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from ranks import run_ranks
from syncbn import SyncBatchNorm, sync_batch_norm_group

OPTIONS = [
    {},
    {"activation": "relu"},
    {"affine": False},
    {"affine": False, "activation": "relu"},
]


def leaves(tail, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *tail, generator=generator).double().requires_grad_() for _ in range(2)]


def function_of(layer, residual):
    def run(x, r, *parameters):
        if parameters:
            named = dict(zip(("weight", "bias"), parameters, strict=True))
            return torch.func.functional_call(layer, named, (x, r) if residual else (x,))
        return layer(x, r) if residual else layer(x)

    return run


@pytest.mark.parametrize("tail", [(2,), (2, 3), (2, 2, 2), (2, 1, 2, 2)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_gradcheck_and_gradgradcheck(tail, options, residual):
    layer = SyncBatchNorm(2, 1e-2, momentum=0.0, **options).double()
    x, r = leaves(tail, 4 if len(tail) < 3 else 2)
    inputs = [x, r] if residual else [x, r.detach()]
    if layer.affine:
        generator = torch.Generator().manual_seed(1)
        inputs += [torch.randn(2, generator=generator).double().requires_grad_() for _ in range(2)]
    assert gradcheck(function_of(layer, residual), inputs)
    assert gradgradcheck(function_of(layer, residual), inputs)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradgradcheck_of_a_group(layout):
    layers = [SyncBatchNorm(2, 1e-2, momentum=0.0).double(), SyncBatchNorm(1, 1e-2, activation="relu").double()]
    x, z = torch.randn(2, 2, 2, 2).double(), torch.randn(5, 1).double()
    inputs = [x.contiguous(memory_format=layout).requires_grad_(), z.requires_grad_()]
    assert gradgradcheck(lambda a, b: tuple(sync_batch_norm_group(layers, [a, b])), inputs)


def test_gradients_are_the_same_whether_or_not_a_graph_is_made():
    layer = SyncBatchNorm(3, activation="relu").double()
    x, dy = torch.randn(4, 3, 5).double().requires_grad_(), torch.randn(4, 3, 5).double()
    wanted = [x, layer.weight, layer.bias]
    plain = torch.autograd.grad(layer(x), wanted, dy)
    graph = torch.autograd.grad(layer(x), wanted, dy, create_graph=True)
    for a, b in zip(graph, plain, strict=True):
        assert relative(a.detach(), b) < 1e-12
    assert graph[0].requires_grad
    assert graph[1].requires_grad


def test_backward_with_a_graph_and_accumulation():
    """loss.backward(create_graph=True) is what Hessian-free optimisers call."""
    layer, plain = SyncBatchNorm(3).double(), nn.BatchNorm1d(3).double()
    found = []
    for one in (layer, plain):
        x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)).double().requires_grad_()
        (gw,) = torch.autograd.grad(one(x).pow(3).sum(), one.weight, create_graph=True)
        found.append(torch.autograd.grad(gw.pow(2).sum(), [x, one.weight]))
    for a, b in zip(*found, strict=True):
        assert relative(a, b) < 1e-10


class Plain(nn.Module):
    """The whole batch in one process, as operators that autograd differentiates twice by itself."""

    def __init__(self, layer):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias
        self.eps, self.activation = layer.eps, layer.activation

    def forward(self, x, residual=None):
        dims = [d for d in range(x.dim()) if d != 1]
        shape = [1, -1, *[1] * (x.dim() - 2)]
        mean = x.mean(dims, keepdim=True)
        var = (x - mean).square().mean(dims, keepdim=True)
        y = (x - mean) / (var + self.eps).sqrt()
        if self.weight is not None:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        y = y if residual is None else y + residual
        return y.relu() if self.activation == "relu" else y


def network(options, plain):
    torch.manual_seed(0)
    norms = [SyncBatchNorm(3, **options).double(), SyncBatchNorm(2, **options).double()]
    for norm in norms:
        if norm.affine:
            norm.weight.data.uniform_(0.5, 2), norm.bias.data.normal_()
    first, second = (Plain(n) if plain else n for n in norms)
    convs = nn.Conv2d(2, 3, 2).double(), nn.Conv2d(3, 2, 2).double()
    return nn.Sequential(convs[0], first, nn.Tanh(), convs[1], second)


def penalty(net, x):
    """A WGAN-GP-like loss: of the outputs and of the gradient with respect to the input."""
    x = x.clone().requires_grad_()
    y = net(x)
    (gradient,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
    loss = y.pow(2).sum() + gradient.pow(2).sum()
    loss.backward()
    return [x.grad], [p.grad for p in net.parameters()]


def penalty_on_ranks(rank, sizes):
    errors = []
    for options, seed in itertools.product(OPTIONS, (0, 1)):
        x = torch.randn(sum(sizes), 2, 4, 4, generator=torch.Generator().manual_seed(seed)).double()
        true_x, true_p = penalty(network(options, plain=True), x)
        found_x, found_p = penalty(network(options, plain=False), x.split(list(sizes))[rank])
        errors.append(relative(found_x[0], true_x[0].split(list(sizes))[rank]))
        for a, b in zip(found_p, true_p, strict=True):
            total = a.clone()
            torch.distributed.all_reduce(total)
            if b.abs().max() > 1e-9:  # the bias before a normalisation has no gradient
                errors.append(relative(total, b))
    return errors


@pytest.mark.parametrize("sizes", [(5,), (3, 2), (4, 0, 1)], ids=str)
def test_gradient_penalty_across_ranks(sizes):
    for errors in run_ranks(penalty_on_ranks, len(sizes), sizes):
        assert max(errors) < 1e-10, errors


def penalty_of_a_group(rank):
    """The grouped form, with a residual: first and second order against the layers' whole-batch composition."""
    sizes = [3, 4]
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(7, c, 3, generator=generator).double() for c in (2, 3)]
    residual = torch.randn(7, 3, 3, generator=generator).double()

    def run(rows, together):
        layers = [SyncBatchNorm(2, activation="relu").double(), SyncBatchNorm(3, activation="relu").double()]
        xs = [x[rows].clone().requires_grad_() for x in whole]
        r = residual[rows].clone().requires_grad_()
        if together:
            from syncbn.nn import start_sync_batch_norm

            ys = start_sync_batch_norm(layers, xs).finish([None, r])
        else:
            ys = [Plain(layers[0])(xs[0]), Plain(layers[1])(xs[1], r)]
        loss = sum(y.pow(3).sum() for y in ys)
        gradients = torch.autograd.grad(loss, [*xs, r], create_graph=True)
        sum(g.pow(2).sum() for g in gradients).backward()
        return [x.grad for x in [*xs, r]]

    rows = slice(0, 3) if rank == 0 else slice(3, 7)
    found, true = run(rows, True), run(slice(0, 7), False)
    return [relative(a, b.split(sizes)[rank]) for a, b in zip(found, true, strict=True)]


def test_gradient_penalty_of_a_group():
    for errors in run_ranks(penalty_of_a_group, 2):
        assert max(errors) < 1e-10, errors


def third_order(rank):
    def run(x, norm):
        x = x.clone().requires_grad_()
        loss = norm(x).pow(3).sum()
        for _ in range(2):
            (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
            loss = gradient.pow(2).sum()
        return torch.autograd.grad(loss, x)[0]

    x = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).double()
    layer = SyncBatchNorm(2).double()
    true = run(x, Plain(layer))
    return relative(run(x[:2] if rank == 0 else x[2:], layer), true[:2] if rank == 0 else true[2:])


def test_third_order():
    assert max(run_ranks(third_order, 2)) < 1e-9
