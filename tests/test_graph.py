"""The operators of compiled graphs, apart from any layer: what torch demands of operators, and the sums of eager."""

import pytest
import torch
from torch.library import opcheck

from syncbn import ops
from syncbn.functional import compiled

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def activations(dtype):
    """Planes, rows, every second row of an image, an empty one, and one of two dimensions."""
    generator = torch.Generator().manual_seed(0)
    x = (3 + torch.randn(4, 5, 6, 8, generator=generator)).to(dtype)
    return [x, x.contiguous(memory_format=torch.channels_last), x[:, :, ::2], x[:0], x[:, :, 0, 0]]


def backward_arguments(dtype, affine, relu):
    xs = activations(dtype)
    dys = [x.flip(0).sin() for x in xs]
    means, vars = zip(*(ops.moments(ops.dense(x)) for x in xs), strict=True)
    weights, biases = ([v.float() if affine else None for v in them] for them in (vars, means))
    return dys, xs, means, vars, weights, biases, [1e-5] * len(xs), [relu] * len(xs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_what_torch_expects_of_operators(dtype):
    opcheck(compiled.forward_message, (activations(dtype), 7))
    for affine, relu in ((True, True), (False, False)):
        opcheck(compiled.backward_sums, backward_arguments(dtype, affine, relu))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_forward_message_is_that_of_eager(dtype):
    xs = activations(dtype)
    assert torch.equal(compiled.forward_message(xs, 7), ops.forward_message([ops.dense(x) for x in xs], (7, 49)))


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_of_gradients_are_those_of_eager(dtype, relu):
    arguments = backward_arguments(dtype, True, relu)
    upstream = [
        ops.Upstream(ops.dense(dy), ops.dense(x), ops.Affine(mean, var, eps, weight, bias, cut), None)
        for dy, x, mean, var, weight, bias, eps, cut in zip(*arguments, strict=True)
    ]
    assert torch.equal(compiled.backward_sums(*arguments), ops.backward_sums(upstream, None)[1])
