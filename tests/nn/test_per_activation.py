"""PerActivationBatchNorm: each (c, h, w) by its own statistics over the batch of all ranks."""

import copy
import pickle

import pytest
import torch
from norm_cases import buffer_bytes, lay_out, relative
from torch import nn

from ranks import run_ranks
from syncbn.nn import PerActivationBatchNorm
from syncbn.ops import reference

SHAPE = (3, 4, 2)


def data(n=7):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, *SHAPE, generator=generator).double() for _ in range(3)]


def on_ranks(rank, sizes, layout, options):
    x, dy, r = data(sum(sizes))
    layer = PerActivationBatchNorm(SHAPE, **options).double()
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2, generator=torch.Generator().manual_seed(1))
    part = lay_out(x.split(list(sizes))[rank], layout).clone().requires_grad_()
    residual = r.split(list(sizes))[rank].clone().requires_grad_()
    y = layer(part, residual)
    y.backward(dy.split(list(sizes))[rank])
    more = {"residual": r.flatten(1), "activation": options.get("activation")}
    flat = (x.flatten(1), layer.weight.detach(), layer.bias.detach())
    true = reference.batch_norm(*flat, **more)
    gradients = reference.batch_norm_gradients(dy.flatten(1), *flat, **more)
    place = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    assert y.shape == part.shape
    return (
        relative(y.detach().flatten(1), true.y[place]),
        relative(part.grad.flatten(1), gradients.x[place]),
        relative(residual.grad.flatten(1), gradients.residual[place]),
        relative(layer.running_var, 0.9 + 0.1 * x.flatten(1).var(0)),
    ), buffer_bytes(layer)


@pytest.mark.parametrize("sizes", [(6,), (3, 4), (5, 0, 2)], ids=str)
@pytest.mark.parametrize("options", [{}, {"activation": "relu"}], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced_last"])
def test_each_activation_is_normalised_alone(sizes, options, layout):
    found = run_ranks(on_ranks, len(sizes), sizes, layout, options)
    for errors, buffers in found:
        assert max(errors) < 1e-12
        assert buffers == found[0][1]


@pytest.mark.usefixtures("float64")
def test_is_batch_norm_1d_of_the_flattened_input():
    layer, plain = PerActivationBatchNorm(SHAPE), nn.BatchNorm1d(24)
    plain.load_state_dict(layer.state_dict())
    x, *_ = data()
    torch.testing.assert_close(layer(x).flatten(1), plain(x.flatten(1)))
    layer.eval(), plain.eval()
    torch.testing.assert_close(layer(x).flatten(1), plain(x.flatten(1)))


def test_output_keeps_the_memory_format():
    layer = PerActivationBatchNorm(SHAPE)
    x = torch.randn(5, *SHAPE).contiguous(memory_format=torch.channels_last)
    for mode in (True, False):
        assert layer.train(mode)(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("shape", [5, (5,), (2, 3), (2, 3, 4, 2)], ids=str)
def test_shapes(shape):
    layer = PerActivationBatchNorm(shape)
    sample = (shape,) if isinstance(shape, int) else shape
    x = torch.randn(6, *sample)
    y = layer(x)
    assert y.shape == x.shape
    assert y.mean(0).abs().max() < 1e-12
    assert layer(x[:0]).shape == (0, *sample)


@pytest.mark.parametrize("shape", [(4, 3, 2, 4), (4, 24), (4, 3, 4), (4, 3, 4, 2, 1), (3, 4, 2)], ids=str)
def test_samples_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"3, 4, 2") as caught:
        PerActivationBatchNorm(SHAPE)(torch.randn(shape))
    assert "\n" not in str(caught.value)


def test_a_residual_of_another_shape():
    """Of as many elements, in another order: not to be reshaped silently."""
    with pytest.raises(ValueError, match="residual"):
        PerActivationBatchNorm(SHAPE)(torch.randn(5, 3, 4, 2), torch.randn(5, 2, 4, 3))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies(duplicate):
    layer = PerActivationBatchNorm(SHAPE, activation="relu").eval()
    twin = duplicate(layer)
    x = torch.randn(5, *SHAPE)
    assert torch.equal(twin(x), layer(x))
    assert "3, 4, 2" in repr(twin)


def test_gradgradcheck():
    layer = PerActivationBatchNorm((1, 2), 1e-2, momentum=0.0).double()
    x = torch.randn(4, 1, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0)], ids=str)
def test_bad_shapes(shape):
    with pytest.raises(ValueError):
        PerActivationBatchNorm(shape)
