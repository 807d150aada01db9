"""What is no floating point tensor, no layer, no batch: named for what it is, in one line that says what to do."""

import time

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from ranks import run_ranks
from syncbn import (
    SyncBatchNorm,
    convert_sync_batchnorm,
    estimate_population_statistics,
    fold_batch_norm,
    revert_sync_batchnorm,
    sync_batch_norm_group,
)
from syncbn.nn import PerActivationBatchNorm, start_sync_batch_norm

# What torch says of kinds that it calls experimental.
EXPERIMENTAL = ("ComplexHalf", "Complex modules", "The PyTorch API", "Sparse CSR", ".*quant")
pytestmark = [pytest.mark.filterwarnings(f"ignore:{text}") for text in EXPERIMENTAL]

X = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def masked(x):
    return torch.masked.masked_tensor(x, x > 0)


def nested(layout):
    return torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=layout)


# What it is, and what is to be done about it.
KINDS = {
    "complex64": (lambda: X.to(torch.complex64), r"complex tensor of torch.complex64.*x\.real and x\.imag"),
    "complex32": (lambda: torch.zeros(2, 0, dtype=torch.complex32), r"complex tensor of torch.complex32.*x\.real"),
    "conjugate": (lambda: X.to(torch.complex128).conj(), r"complex tensor of torch.complex128.*x\.real"),
    "int64": (lambda: X.long(), r"torch.int64.*\.float\(\)"),
    "uint16": (lambda: X.abs().to(torch.uint16), r"torch.uint16.*\.float\(\)"),
    "bool": (lambda: X > 0, r"torch.bool.*\.float\(\)"),
    "float8": (lambda: X.to(torch.float8_e4m3fn), r"torch.float8_e4m3fn.*scale.*torch.bfloat16"),
    "bits": (lambda: torch.empty(4, 3, dtype=torch.bits16), r"torch.bits16.*raw bits"),
    "uint4": (lambda: torch.empty(4, 3, dtype=torch.uint4), r"torch.uint4.*raw bits"),
    "quantised": (
        lambda: torch.quantize_per_tensor(X, 0.1, 0, torch.qint8),
        r"quantized tensor of torch.qint8.*\.dequantize\(\)",
    ),
    "sparse": (lambda: X.to_sparse(), r"sparse tensor \(torch.sparse_coo\).*\.to_dense\(\)"),
    "sparse rows": (lambda: X[:, :, 0, 0].to_sparse_csr(), r"sparse tensor \(torch.sparse_csr\).*\.to_dense\(\)"),
    "nested": (lambda: nested(torch.strided), r"nested tensor.*torch.cat\(x.unbind\(\)\)"),
    "jagged": (lambda: nested(torch.jagged), r"nested tensor.*torch.cat\(x.unbind\(\)\)"),
    "masked": (lambda: masked(X), r"masked tensor.*\.to_tensor\("),
    "lazy": (nn.UninitializedParameter, "uninitialized parameter.*run the lazy module"),
    "list": (lambda: [X, X], "a list.*the one tensor in it"),
    "tuple": (lambda: (X,), "a tuple.*the one tensor in it"),
    "dict": (lambda: {"x": X}, "a dict.*the one tensor in it"),
    "None": (lambda: None, "None.*returned nothing"),
    "NumPy": (lambda: X.numpy(), r"NumPy ndarray.*torch.as_tensor\(\)"),
    "NumPy number": (lambda: np.float32(1), r"NumPy float32.*torch.as_tensor\(\)"),
    "int": (lambda: 3, "an int.*torch.Tensor"),
    "str": (lambda: "x", "a str.*torch.Tensor"),
}
LAYERS = {
    "layer": (lambda: SyncBatchNorm(3), lambda layer, x, *r: layer(x, *r)),
    "group": (lambda: SyncBatchNorm(3), lambda layer, x, *r: sync_batch_norm_group([layer, layer], [X, x])),
    "per activation": (lambda: PerActivationBatchNorm((3, 5, 5)), lambda layer, x, *r: layer(x, *r)),
}


def refused(match, run):
    with pytest.raises(ValueError, match=match) as caught:
        run()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("way", LAYERS)
@pytest.mark.parametrize("kind", KINDS)
def test_inputs(kind, way, training):
    (make, expected), (build, run) = KINDS[kind], LAYERS[way]
    layer = build().train(training)
    refused(f"as input, got .*{expected}", lambda: run(layer, make()))
    assert layer.num_batches_tracked == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("way", ["layer", "per activation"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "None"])
def test_residuals(kind, way, training):
    (make, expected), (build, run) = KINDS[kind], LAYERS[way]
    layer = build().train(training)
    refused(f"as residual, got .*{expected}", lambda: run(layer, X, make()))
    assert layer.num_batches_tracked == 0


def test_no_advice_takes_the_imaginary_part_away():
    for make, _ in (KINDS["complex64"], KINDS["complex32"]):
        assert ".float()" not in refused("complex", lambda make=make: SyncBatchNorm(3)(make()))
    assert ".float()" not in refused("complex64", lambda: SyncBatchNorm(3).to(torch.complex64)(X))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("residual", [False, True])
def test_oneDNN_tensors_as_plain(residual, training):
    """In its layout, as `torch.utils.mkldnn` makes them; the gradient of eval mode, which plain lacks, included."""
    layer, twin = SyncBatchNorm(3).train(training), SyncBatchNorm(3).train(training)
    x, z = (X.clone().requires_grad_() for _ in range(2))
    y = layer(x.to_mkldnn(), *([X.to_mkldnn()] if residual else []))
    assert y.is_mkldnn
    true = twin(z, *([X] if residual else []))
    assert torch.equal(y.to_dense(), true)
    y.to_dense().pow(3).sum().backward(), true.pow(3).sum().backward()
    assert torch.equal(x.grad, z.grad)
    torch.testing.assert_close(layer.running_var, twin.running_var)


def test_tensors_without_values():
    layer = SyncBatchNorm(3, device="meta")
    assert layer(X.to("meta")).is_meta
    refused(r"weight .*on meta.*input on cpu.*\.to_empty\(device='cpu'\)", lambda: layer(X))
    refused(r"weight .*on cpu.*input on meta.*\.to\('meta'\)", lambda: SyncBatchNorm(3)(X.to("meta")))
    refused("residual on meta for an input on cpu", lambda: SyncBatchNorm(3)(X, X.to("meta")))
    with FakeTensorMode() as mode:
        assert SyncBatchNorm(3)(torch.empty(4, 3, 5)).shape == (4, 3, 5)
    refused("FakeTensor.*weight is not.*FakeTensorMode", lambda: SyncBatchNorm(3)(mode.from_tensor(X)))


DTYPES = {
    torch.complex64: r"leave it out of \.to\(torch.complex64\)",
    torch.int32: r"use \.float\(\) on the layer",
    torch.float8_e5m2: r"use \.float\(\) on the layer",
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_parameters_and_buffers_of_other_dtypes(dtype, name, training):
    layer = SyncBatchNorm(3).train(training)
    value = getattr(layer, name).detach().to(dtype)
    setattr(layer, name, nn.Parameter(value, requires_grad=False) if name in layer._parameters else value)
    refused(f"{name} .*{dtype}.*{DTYPES[dtype]}", lambda: layer(X))
    assert layer.num_batches_tracked == 0


def freed(t):
    """As FSDP frees parameters."""
    t.untyped_storage().resize_(0)
    return t


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var", "input", "gradient"])
def test_freed_memory(name):
    """A null pointer, which the passes would take for no weight, or read."""
    layer, x, dy = SyncBatchNorm(3), X.clone().requires_grad_(), torch.ones_like(X)
    tensor = x.data if name == "input" else dy if name == "gradient" else getattr(layer, name).data
    y = layer(x) if name == "gradient" else None
    freed(tensor)
    with pytest.raises((ValueError, RuntimeError), match=r"without memory.*freed|not allocated"):  # ours, or ATen's
        layer(x) if y is None else y.backward(dy)


NOT_AS_STORED = {
    "negated": lambda v: torch._neg_view(-v),
    "zeros": lambda v: torch._efficientzerotensor(v.shape, dtype=v.dtype),
}


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var", "input", "gradient"])
@pytest.mark.parametrize("kind", NOT_AS_STORED)
def test_what_does_not_lie_in_memory_as_it_is(kind, name):
    """Negated when read, as the imaginary part of a conjugate, or zeros that take no memory: as what it stands for."""
    if kind == "zeros" and name.startswith("running"):
        return  # nobody can write to them
    found = []
    for make in (NOT_AS_STORED[kind], lambda v: NOT_AS_STORED[kind](v).clone()):
        layer = SyncBatchNorm(3, dtype=torch.float64).double()
        values = {**layer.state_dict(), "input": X.double(), "gradient": X.double() ** 2}
        values[name] = make(values[name] + 2)
        x, dy = values.pop("input").detach().requires_grad_(), values.pop("gradient")
        for parameter in ("weight", "bias"):
            values[parameter].requires_grad_()
        y = torch.func.functional_call(layer, values, (x,))
        gradients = torch.autograd.grad(y, (x, values["weight"], values["bias"]), dy)
        found.append([y, *gradients, values["running_mean"], values["running_var"]])
    torch.testing.assert_close(*found)


def test_sparse_gradients():
    layer = SyncBatchNorm(3)
    chosen = torch.gather(layer(X.clone().requires_grad_()), 1, torch.zeros(4, 1, 5, 5).long(), sparse_grad=True)
    refused(r"gradient.*sparse tensor \(torch.sparse_coo\).*without sparse_grad=True", chosen.sum().backward)


def test_lists():
    a, b = SyncBatchNorm(3), SyncBatchNorm(3)
    refused("a list as layers, got a SyncBatchNorm", lambda: sync_batch_norm_group(a, [X]))
    refused("a list as inputs, got a Tensor", lambda: sync_batch_norm_group([a] * 4, X))
    refused("a list as inputs, got None", lambda: sync_batch_norm_group([a], None))
    refused("got an empty list", lambda: sync_batch_norm_group([[]], [X]))
    refused("got BatchNorm2d.*convert_sync_batchnorm", lambda: sync_batch_norm_group([nn.BatchNorm2d(3)], [X]))
    refused("got str", lambda: sync_batch_norm_group(["layer"], [X]))
    refused("got type", lambda: sync_batch_norm_group([SyncBatchNorm], [X]))
    refused("a list as residuals, got a Tensor", lambda: start_sync_batch_norm([a], [X]).finish(X))
    refused("expected 2 residuals.*got 1", lambda: start_sync_batch_norm([a, b], [X, X]).finish([None]))
    refused("as residual, got .*complex", lambda: start_sync_batch_norm([a], [X]).finish([X * 1j]))
    assert a.num_batches_tracked == b.num_batches_tracked == 0
    side_by_side = sync_batch_norm_group(nn.ModuleList([nn.ModuleList([a, b])]), (torch.cat([X, X], 1),))
    assert torch.equal(side_by_side[0][:, :3], side_by_side[0][:, 3:])


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))


@pytest.mark.filterwarnings("ignore:.torch.jit.*:DeprecationWarning")  # torch's own
@pytest.mark.parametrize(
    "function",
    [
        convert_sync_batchnorm,
        revert_sync_batchnorm,
        fold_batch_norm,
        lambda module: estimate_population_statistics(module, [X], 1),
    ],
    ids=["convert", "revert", "fold", "estimate"],
)
def test_what_is_no_module(function):
    refused("expected a torch.nn.Module, got None", lambda: function(None))
    refused("got a list: do it with each module in it", lambda: function([network()]))
    refused("got a function", lambda: function(network))
    refused("got the class BatchNorm2d: make an instance", lambda: function(nn.BatchNorm2d))
    scripted = nn.Sequential(torch.jit.script(network().eval()))
    refused(r"'0.1' is a scripted or traced BatchNorm2d.*before torch.jit", lambda: function(scripted))


BATCHES = {
    "None": ([None], "begins with NoneType"),
    "a string": (["abc"], "begins with str"),
    "an empty tuple": ([()], "begins with tuple"),
    "an empty dict": ([{}], "begins with dict"),
    "a number in a tuple": ([(3, X)], "begins with int"),
    "NumPy": ([X.numpy()], "begins with ndarray"),
    "a tensor": (X, "iterable of batches, got Tensor"),
    "a number": (3, "iterable of batches, got int"),
    "none": (None, "iterable of batches, got NoneType"),
    "too few": ([], "after 0 this rank has no further batch"),
}


@pytest.mark.parametrize("name", BATCHES)
def test_batches(name):
    batches, expected = BATCHES[name]
    layer = SyncBatchNorm(3)
    refused(expected, lambda: estimate_population_statistics(layer, batches, 1))
    assert layer.training
    assert layer.running_mean.tolist() == [0, 0, 0]
    estimate_population_statistics(layer, [{"image": (X, 3)}], 1)


@pytest.mark.parametrize("number", [0, -1, 1.5, "1", None])
def test_numbers_of_batches(number):
    refused(
        f"num_batches must be an integer.*{number!r}", lambda: estimate_population_statistics(network(), [X], number)
    )


GROUP_TIMEOUT = 4


def one_rank_has_another_input(rank):
    """Errors and seconds: of an input that one rank alone cannot take, and of such a batch."""
    found = []
    layer = SyncBatchNorm(3)
    layer(X)
    for run in (
        lambda: estimate_population_statistics(layer, ["x" if rank == 0 else X], 1),
        lambda: layer(X.to(torch.complex64) if rank == 0 else X),
    ):
        begin = time.monotonic()
        try:
            run()
            found.append(("no error", 0))
        except (ValueError, RuntimeError) as error:
            found.append((f"{type(error).__name__}: {error}", time.monotonic() - begin))
    return found


def test_one_rank_has_another_input():
    (first, second), (others_first, others_second) = run_ranks(
        one_rank_has_another_input, 2, group_timeout=GROUP_TIMEOUT
    )
    assert "begins with str" in first[0]
    assert "after 0 another rank has none" in others_first[0]
    assert "complex64" in second[0]
    assert others_second[0].startswith("RuntimeError") and "rank 0" in others_second[0]
    assert max(first[1], others_first[1], second[1], others_second[1]) < GROUP_TIMEOUT + 10
