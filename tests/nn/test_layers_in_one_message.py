"""Several layers, one message: sync_batch_norm_group, start and finish, layers side by side in one input."""

import pytest
import torch
from norm_cases import lay_out, relative
from torch import nn

from exactness import TOLERANCE
from ranks import run_ranks
from syncbn import SyncBatchNorm, sync_batch_norm_group
from syncbn.nn import start_sync_batch_norm
from syncbn.ops import reference

TAILS = [(3,), (4, 5), (2, 6, 5), (5, 3, 2, 4), (3, 6, 5)]
OPTIONS = [{}, {"activation": "relu"}, {"affine": False}, {"momentum": None}, {"activation": "relu", "momentum": 1.0}]
LAYOUTS = ["contiguous", "contiguous", "channels_last", "channels_last", "batch_second"]


def make_layers(dtype=torch.float64):
    layers = [SyncBatchNorm(tail[0], **options).to(dtype) for tail, options in zip(TAILS, OPTIONS, strict=True)]
    for layer in layers:
        if layer.affine:
            layer.weight.data = torch.linspace(0.5, 2, layer.num_features, dtype=dtype)
            layer.bias.data = torch.linspace(-1, 1, layer.num_features, dtype=dtype)
    return layers


def inputs_of(rank, dtype=torch.float64, sizes=(4, 3, 6)):
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(sum(sizes), *tail, generator=generator, dtype=torch.float64) for tail in TAILS]
    parts = [x.split(list(sizes))[rank].to(dtype) for x in whole]
    return [lay_out(x, layout).clone().requires_grad_() for x, layout in zip(parts, LAYOUTS, strict=True)]


def results(layers, inputs, outputs):
    loss = sum((y.double() ** 3).sum() for y in outputs)
    loss.backward()
    found = [t.detach() for t in outputs] + [x.grad for x in inputs]
    found += [p.grad for layer in layers for p in layer.parameters()]
    return found + [b.double() for layer in layers for b in layer.buffers()]


def one_by_one_and_together(rank):
    worst = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        found = []
        for together in (False, True):
            layers, inputs = make_layers(), inputs_of(rank, dtype)
            outputs = (
                sync_batch_norm_group(layers, inputs)
                if together
                else [layer(x) for layer, x in zip(layers, inputs, strict=True)]
            )
            for x, y, layout in zip(inputs, outputs, LAYOUTS, strict=True):
                assert y.dtype == x.dtype
                assert layout == "batch_second" or y.stride() == x.stride()
            found.append(results(layers, inputs, outputs))
        limit = TOLERANCE[dtype]
        worst += [(str(dtype), i) for i, (a, b) in enumerate(zip(*found, strict=True)) if not relative(b, a) < limit]
    return worst


@pytest.mark.parametrize("P", [1, 2, 3])
def test_a_group_is_its_layers_one_by_one(P):
    assert run_ranks(one_by_one_and_together, P) == [[]] * P


def test_a_group_without_a_world():
    assert one_by_one_and_together(0) == []


def sizes_of_their_own(rank):
    """In one message, activations whose batches differ: 6 and 2 images, none and 5 (rank 0), ..."""
    sizes = [(6, 2), (0, 5), (3, 0), (0, 0)]
    tails = [(3, 4), (2,), (4, 3, 3), (2, 2)]
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(sum(s), *t, generator=generator).double() for s, t in zip(sizes, tails, strict=True)]
    dys = [torch.randn(x.shape, generator=generator).double() for x in whole]
    layers = [SyncBatchNorm(t[0]).double() for t in tails]
    inputs = [x.split(list(s))[rank].clone().requires_grad_() for x, s in zip(whole, sizes, strict=True)]
    outputs = sync_batch_norm_group(layers, inputs)
    torch.autograd.backward(outputs, [dy.split(list(s))[rank] for dy, s in zip(dys, sizes, strict=True)])
    errors = []
    for layer, x, y, all_x, dy, size in zip(layers, inputs, outputs, whole, dys, sizes, strict=True):
        if len(all_x) == 0:
            assert layer.num_batches_tracked == 0
            continue
        errors.append(relative(y.detach(), reference.batch_norm(all_x).y.split(list(size))[rank]))
        errors.append(relative(x.grad, reference.batch_norm_gradients(dy, all_x).x.split(list(size))[rank]))
        unbiased = all_x.transpose(0, 1).flatten(1).var(1)
        errors.append(relative(layer.running_var, 0.9 + 0.1 * unbiased))
    return errors


def test_batches_of_different_size_in_one_message():
    for errors in run_ranks(sizes_of_their_own, 2):
        assert max(errors) < 1e-12


def siblings(rank):
    """Layers side by side in one input are one layer with their parameters and buffers laid end to end."""
    failed = []
    for options in ({}, {"activation": "relu"}, {"affine": False}, {"momentum": None}):
        found = []
        for together in (False, True):
            torch.manual_seed(0)
            layers = [SyncBatchNorm(c, **options).double() for c in (3, 1, 4)]
            x = torch.randn(3 + rank, 8, 5, 4, generator=torch.Generator().manual_seed(rank)).double().requires_grad_()
            other, z = SyncBatchNorm(2).double(), torch.randn(4, 2).double().requires_grad_()
            if together:
                y, w = sync_batch_norm_group([layers, other], [x, z])
            else:
                parts = x.split([3, 1, 4], 1)
                y, w = torch.cat([layer(p) for layer, p in zip(layers, parts, strict=True)], 1), other(z)
            found.append(results([*layers, other], [x, z], [y, w]))
        failed += [(str(options), i) for i, (a, b) in enumerate(zip(*found, strict=True)) if not relative(b, a) < 1e-12]
    return failed


@pytest.mark.parametrize("P", [1, 2])
def test_layers_side_by_side(P):
    assert run_ranks(siblings, P) == [[]] * P


@pytest.mark.usefixtures("float64")
def test_layers_side_by_side_in_eval():
    layers = [SyncBatchNorm(2, activation="relu"), SyncBatchNorm(3, activation="relu")]
    for layer in layers:
        layer.running_mean.normal_(), layer.running_var.uniform_(1, 2)
        layer.eval()
    x = torch.randn(4, 5, 3)
    (y,) = sync_batch_norm_group([layers], [x])
    torch.testing.assert_close(y, torch.cat([layers[0](x[:, :2]), layers[1](x[:, 2:])], 1))


def with_residuals(rank):
    failed = []
    for together in (False, True):
        torch.manual_seed(rank)
        layers = [SyncBatchNorm(3, activation="relu").double(), SyncBatchNorm(2).double(), SyncBatchNorm(2).double()]
        inputs = [torch.randn(4, layer.num_features, 5).double().requires_grad_() for layer in layers]
        residuals = [torch.randn(4, 3, 5).double().requires_grad_(), None, torch.randn(4, 2, 5).double()]
        if together:
            outputs = start_sync_batch_norm(layers, inputs).finish(residuals)
        else:
            outputs = [layer(x, r) for layer, x, r in zip(layers, inputs, residuals, strict=True)]
        found = [*results(layers, inputs, outputs), residuals[0].grad]
        failed.append(found)
    return [relative(b, a) for a, b in zip(*failed, strict=True)]


def test_residuals_of_some():
    for errors in run_ranks(with_residuals, 2):
        assert max(errors) < 1e-12


def one_output_used(rank):
    """The other outputs' gradients are None; the message goes all the same."""
    torch.manual_seed(rank)
    layers = [SyncBatchNorm(3).double(), SyncBatchNorm(2).double(), SyncBatchNorm(4).double()]
    inputs = [torch.randn(4, layer.num_features, 5).double().requires_grad_() for layer in layers]
    outputs = sync_batch_norm_group(layers, inputs)
    outputs[1].pow(3).sum().backward()
    twin, x = SyncBatchNorm(2).double(), inputs[1].detach().clone().requires_grad_()
    twin(x).pow(3).sum().backward()
    others = [t for i in (0, 2) for t in (inputs[i].grad, layers[i].weight.grad) if t is not None]
    return (
        relative(inputs[1].grad, x.grad),
        relative(layers[1].weight.grad, twin.weight.grad),
        max(t.abs().max().item() for t in others) if others else 0.0,
    )


@pytest.mark.parametrize("P", [1, 2])
def test_one_output_used(P):
    for errors in run_ranks(one_output_used, P):
        assert max(errors) < 1e-12


def inputs_with_and_without_gradient(rank):
    torch.manual_seed(rank)
    layers = [SyncBatchNorm(3).double(), SyncBatchNorm(2).double()]
    inputs = [torch.randn(4, 3, 5).double(), torch.randn(4, 2).double().requires_grad_()]
    sum(y.pow(3).sum() for y in sync_batch_norm_group(layers, inputs)).backward()
    twin, x = SyncBatchNorm(2).double(), inputs[1].detach().clone().requires_grad_()
    twin(x).pow(3).sum().backward()
    return relative(inputs[1].grad, x.grad), layers[0].weight.grad.isfinite().all().item()


def test_inputs_with_and_without_gradient():
    for error, finite in run_ranks(inputs_with_and_without_gradient, 2):
        assert error < 1e-12
        assert finite


def modes_mixed(rank):
    """Some layers in eval, one frozen without running statistics: only those in training are synchronised."""
    layers = [SyncBatchNorm(3), SyncBatchNorm(3).eval(), SyncBatchNorm(3, track_running_stats=False)]
    layers[1].running_mean.fill_(2.0)
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(rank))
    whole = torch.cat([torch.randn(4, 3, generator=torch.Generator().manual_seed(r)) for r in range(2)])
    outputs = sync_batch_norm_group(layers, [x, x, x])
    true = reference.batch_norm(whole).y[4 * rank : 4 * rank + 4]
    return (
        relative(outputs[0].detach(), true),
        relative(outputs[1].detach(), (x.double() - 2) / (1 + 1e-5) ** 0.5),
        relative(outputs[2].detach(), true),
    )


def test_modes_mixed():
    for errors in run_ranks(modes_mixed, 2):
        assert max(errors) < TOLERANCE[torch.float32]


def the_same_layer_twice(rank):
    """As a shared head on two scales: both inputs count as steps of the running statistics, in order."""
    found = []
    for together in (False, True):
        torch.manual_seed(rank)
        layer = SyncBatchNorm(3).double()
        inputs = [torch.randn(4, 3, 5).double().requires_grad_(), torch.randn(2, 3).double().requires_grad_()]
        outputs = sync_batch_norm_group([layer, layer], inputs) if together else [layer(x) for x in inputs]
        found.append(results([layer], inputs, outputs))
    return [relative(b, a) for a, b in zip(*found, strict=True)]


@pytest.mark.parametrize("P", [1, 2])
def test_the_same_layer_twice_in_a_group(P):
    for errors in run_ranks(the_same_layer_twice, P):
        assert max(errors) < 1e-12


def started_and_never_finished(rank):
    """An exception between the two halves must not spoil the next step."""
    layer, x = SyncBatchNorm(3).double(), torch.randn(4, 3).double()
    start_sync_batch_norm([layer], [x])
    layer(x)
    return layer.num_batches_tracked.item()


def test_started_and_never_finished():
    assert run_ranks(started_and_never_finished, 2) == [1, 1]


def interleaved(rank):
    """Two synchronisations under way at once, finished in either order."""
    errors = []
    for order in ((0, 1), (1, 0)):
        torch.manual_seed(rank)
        layers = [SyncBatchNorm(3).double(), SyncBatchNorm(5).double()]
        inputs = [torch.randn(4, layer.num_features).double().requires_grad_() for layer in layers]
        pending = [start_sync_batch_norm([layer], [x]) for layer, x in zip(layers, inputs, strict=True)]
        outputs = {i: pending[i].finish()[0] for i in order}
        found = results(layers, inputs, [outputs[0], outputs[1]])
        twins = [SyncBatchNorm(3).double(), SyncBatchNorm(5).double()]
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        true = results(twins, leaves, [layer(x) for layer, x in zip(twins, leaves, strict=True)])
        errors += [relative(a, b) for a, b in zip(found, true, strict=True)]
    return errors


def test_two_messages_under_way_at_once():
    for errors in run_ranks(interleaved, 2):
        assert max(errors) < 1e-12


def test_outputs_of_a_group_may_be_worked_on_in_place():
    layers = [SyncBatchNorm(3), SyncBatchNorm(2)]
    inputs = [torch.randn(4, 3, 5, requires_grad=True), torch.randn(4, 2, requires_grad=True)]
    for y in sync_batch_norm_group(layers, inputs):
        nn.functional.relu(y, inplace=True).pow(2).sum().backward(retain_graph=True)


def split(rank):
    """Outputs of layers side by side, together and apart, in training and evaluation."""
    found = []
    for apart in (False, True):
        torch.manual_seed(rank)
        layers = [[SyncBatchNorm(C).double() for C in (2, 3)], SyncBatchNorm(4).double()]
        inputs = [torch.randn(3, C, 2, 2).double().requires_grad_() for C in (5, 4)]
        ys = start_sync_batch_norm(layers, inputs, split=apart).finish()
        ys = ys if apart else [*ys[0].split([2, 3], dim=1), ys[1]]
        gradients = torch.autograd.grad(sum((y**3).sum() for y in ys), inputs)
        for layer in nn.ModuleList([*layers[0], layers[1]]):
            layer.eval()
        evaluated = start_sync_batch_norm(layers, inputs, split=apart).finish()
        evaluated = evaluated if apart else [*evaluated[0].split([2, 3], dim=1), evaluated[1]]
        found.append([*ys, *gradients, *evaluated])
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("P", [1, 2])
def test_layers_side_by_side_return_an_output_each(P):
    assert run_ranks(split, P) == [True] * P


def test_an_output_each_and_residuals():
    x, layers = torch.randn(3, 4), [[SyncBatchNorm(2), SyncBatchNorm(2)]]
    with pytest.raises(ValueError, match="residuals cannot be added with split=True: leave split out"):
        start_sync_batch_norm(layers, [x], split=True).finish([x])
    assert len(start_sync_batch_norm(layers, [x], split=True).finish([None])) == 2


def shared(rank):
    """Gradients of an input that two layers share, and of a layer that runs twice: with a graph of them and without."""
    torch.manual_seed(rank)
    layers = [SyncBatchNorm(3, activation="relu").double() for _ in range(2)]
    x = torch.randn(4, 3).double().requires_grad_()
    found = []
    for create_graph in (False, True):
        ys = [*sync_batch_norm_group(layers, [x, x]), *sync_batch_norm_group([layers[0], layers[0]], [x, x * x])]
        loss = sum((y**3).sum() for y in ys)
        found.append(torch.autograd.grad(loss, [x, *layers[0].parameters()], create_graph=create_graph))
    return [relative(b.detach(), a) for a, b in zip(*found, strict=True)]


@pytest.mark.parametrize("P", [1, 2])
def test_what_occurs_twice_in_a_message_counts_twice_in_gradients_with_a_graph(P):
    for errors in run_ranks(shared, P):
        assert max(errors) < 1e-12
