"""SyncBatchNorm in one process: against the oracle, and in place of nn.BatchNorm1d/2d/3d."""

import pytest
import torch
from norm_cases import Case, errors, failures, lay_out, make_layer, relative, stock_errors, whole_batch
from torch import nn

from exactness import TOLERANCE, allowed
from syncbn import SyncBatchNorm
from syncbn.ops import reference

TAILS = {2: (3,), 3: (3, 10), 4: (3, 6, 4), 5: (3, 4, 2, 5)}
LAYOUTS = [
    (layout, tail)
    for tail in TAILS.values()
    for layout in ("contiguous", "channels_last", "batch_second", "sliced_channels", "sliced_last", "sliced_batch")
    if not (len(tail) == 1 and layout == "sliced_last")
] + [("swapped_last", TAILS[4]), ("swapped_last", TAILS[5])]
OPTIONS = [
    {},
    {"affine": False},
    {"activation": "relu"},
    {"residual": True},
    {"residual": True, "activation": "relu"},
    {"residual": True, "activation": "relu", "affine": False},
    {"momentum": None},
    {"momentum": 0.0},
    {"momentum": 1.0},
    {"eps": 1e-2},
]
FLOAT32 = TOLERANCE[torch.float32]
PLAIN = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}


def check(case, tolerance=None):
    assert failures(case, errors(case), tolerance) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("layout", "tail"), LAYOUTS, ids=str)
def test_layouts(layout, tail, dtype):
    check(Case(tail, (5,), dtype, layout, layout))


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize(
    ("layout", "dy_layout"), [(a, b) for a, t in LAYOUTS for b, u in LAYOUTS if t == u == TAILS[4]]
)
def test_x_and_dy_in_different_formats(layout, dy_layout, activation):
    check(Case(TAILS[4], (5,), torch.float32, layout, dy_layout, activation=activation, residual=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("tail", TAILS.values(), ids=str)
def test_options(tail, options, dtype):
    check(Case(tail, (6,), dtype, **options))


@pytest.mark.parametrize("mean", [1000.0, 3000.0, -1000.0, 30.0])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "batch_second"])
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("tail", [(5,), (5, 9, 7)], ids=str)
def test_mean_large_against_deviation(tail, activation, layout, mean):
    sizes = (257,) if len(tail) == 1 else (8,)
    check(Case(tail, sizes, mean=mean, std=1.0, layout=layout, activation=activation))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_float64_keeps_its_digits_at_a_large_mean(layout):
    """The condition number of var is mean^2/var = 1e6 for an E[x^2] - E[x]^2; nn.BatchNorm2d keeps 1e-12."""
    check(Case((5, 9, 7), (8,), torch.float64, mean=1000.0, std=1.0, layout=layout), 1e-11)


MANY = pytest.mark.parametrize(
    ("tail", "size", "layout"),
    [
        ((3, 512, 512), 4, "contiguous"),
        ((3, 512, 512), 4, "channels_last"),
        ((2, 513, 511), 2, "contiguous"),  # no even divisor to cut the plane by
        ((1, 160_001), 2, "contiguous"),
        ((1, 160_001), 2, "channels_last"),
        ((8,), 100_000, "contiguous"),
        ((8,), 100_003, "contiguous"),
        ((8,), 100_003, "batch_second"),
        ((1,), 200_003, "contiguous"),
        ((16, 56, 56), 32, "channels_last"),
        ((16, 56, 56), 32, "contiguous"),
        ((7, 3, 3), 4999, "contiguous"),
        ((6, 12, 10), 8, "channels_last"),
        ((4, 31, 31), 1, "channels_last"),
        ((5,), 1021, "contiguous"),
        ((5,), 2047, "contiguous"),
    ],
    ids=str,
)


@MANY
def test_sums_over_very_many_elements(tail, size, layout):
    check(Case(tail, (size,), layout=layout, dy_layout=layout, mean=0.0, std=1.0))


@MANY
def test_sums_that_nearly_cancel(tail, size, layout):
    """dy with a mean of 1 makes dgamma = sum dy xhat ill-conditioned: there, no worse than twice nn.BatchNorm."""
    case = Case(tail, (size,), layout=layout, dy_layout=layout, mean=1.9, std=1.0, dy_mean=1.0)
    found = errors(case)
    assert found.pop("dgamma") <= allowed(stock_errors(case)["dgamma"])
    assert failures(case, found) == []


@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1000.1])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_constant_channel(value, layout):
    """One channel without variance beside two ordinary ones: y is beta there, dx is what the formula says."""
    case = Case((3, 9, 7), (6,), layout=layout)
    batch = whole_batch(case)
    batch.x[:, 1] = value
    x = lay_out(batch.x, layout).requires_grad_()
    layer = make_layer(case)
    y = layer(x)
    y.backward(batch.dy)
    oracle, gradients = reference.batch_norm(batch.x), reference.batch_norm_gradients(batch.dy, batch.x)
    assert (y[:, 1].detach() - oracle.y[:, 1]).abs().max() < FLOAT32
    for c in range(3):
        assert relative(x.grad[:, c], gradients.x[:, c]) < FLOAT32, c
    assert layer.running_var[1].item() == pytest.approx(0.9, rel=FLOAT32)


@pytest.mark.parametrize("where", [(0, 0), (2, 3), (5, 62)])
@pytest.mark.parametrize("size", [1e2, 3e4, 1e6])
@pytest.mark.parametrize("mean", [0.0, 1000.0])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_outlier(where, size, mean, layout):
    case = Case((3, 63), (6,), layout=layout, mean=mean, std=1.0)
    batch = whole_batch(case)
    batch.x[where[0], 1, where[1]] += size
    x = lay_out(batch.x, layout).requires_grad_()
    layer = make_layer(case)
    y = layer(x)
    y.backward(batch.dy)
    oracle, gradients = reference.batch_norm(batch.x), reference.batch_norm_gradients(batch.dy, batch.x)
    for c in range(3):
        assert relative(y[:, c].detach(), oracle.y[:, c]) < FLOAT32, c
        assert relative(x.grad[:, c], gradients.x[:, c]) < FLOAT32, c


@pytest.mark.parametrize("scale", [1e-15, 1e15])
def test_values_of_any_magnitude(scale):
    check(Case((3, 8, 8), (4,), mean=0.3 * scale, std=scale, eps=1e-5 * scale**2))


@pytest.mark.parametrize("dy_of", [torch.sum, torch.mean])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradient_that_is_expanded_from_a_scalar(dy_of, layout):
    """y.sum().backward() hands over a dy of strides 0."""
    torch.manual_seed(0)
    x = lay_out(torch.randn(4, 3, 5, 5), layout).requires_grad_()
    layer = SyncBatchNorm(3, activation="relu")
    y = layer(x)
    dy_of(y).backward()
    dy = torch.full_like(x, 1.0 if dy_of is torch.sum else 1 / x.numel())
    expected = reference.batch_norm_gradients(dy, x.detach(), activation="relu")
    assert relative(x.grad, expected.x) < FLOAT32
    assert relative(layer.bias.grad, expected.beta) < FLOAT32


def test_expanded_input():
    row = torch.randn(4, 3, 1, 1, generator=torch.Generator().manual_seed(0)).requires_grad_()
    image = torch.randn(1, 1, 5, 5, generator=torch.Generator().manual_seed(1))
    for x in (row.expand(4, 3, 5, 6), image.expand(4, 3, 5, 5), (row * image).expand(4, 3, 5, 5)):
        y = SyncBatchNorm(3)(x)
        assert relative(y.detach(), reference.batch_norm(x.detach()).y) < FLOAT32
        if x.requires_grad:
            dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
            (found,) = torch.autograd.grad(y, x, dy)
            assert relative(found, reference.batch_norm_gradients(dy, x.detach()).x) < FLOAT32


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("tracked", [True, False])
@pytest.mark.parametrize("tail", TAILS.values(), ids=str)
def test_is_a_plain_batch_norm(tail, tracked, momentum, affine):
    """Several training steps and an eval, everything compared with nn.BatchNorm1d/2d/3d in float64."""
    arguments = {"affine": affine, "momentum": momentum, "track_running_stats": tracked, "dtype": torch.float64}
    plain, ours = PLAIN[len(tail) + 1](3, **arguments), SyncBatchNorm(3, **arguments).double()
    generator = torch.Generator().manual_seed(0)
    for n in (4, 2, 9):
        x = torch.randn(n, *tail, generator=generator, dtype=torch.float64)
        pair = [x.clone().requires_grad_() for _ in range(2)]
        loss = [(layer(x) ** 3).sum() for layer, x in zip((plain, ours), pair, strict=True)]
        for one in loss:
            one.backward()
        torch.testing.assert_close(pair[1].grad, pair[0].grad, rtol=1e-9, atol=1e-10)
    for (name, a), (_, b) in zip(plain.named_parameters(), ours.named_parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-10, atol=1e-10, msg=name)
    for (name, a), (other, b) in zip(plain.named_buffers(), ours.named_buffers(), strict=True):
        assert name == other
        torch.testing.assert_close(b, a, rtol=1e-12, atol=1e-12, msg=name)
    plain.eval(), ours.eval()
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"affine": False}], ids=str)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced_last"])
def test_eval(options, residual, layout):
    torch.manual_seed(0)
    plain = nn.BatchNorm2d(3, affine=options.get("affine", True))
    plain.running_mean.normal_(), plain.running_var.uniform_(0.5, 2)
    ours = SyncBatchNorm(3, **options).eval()
    ours.load_state_dict(plain.eval().state_dict())
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    x = lay_out(torch.randn(4, 3, 5, 6), layout).requires_grad_()
    x_plain = x.detach().clone().requires_grad_()
    r = torch.randn(4, 3, 5, 6)
    expected = plain(x_plain) + r if residual else plain(x_plain)
    expected = expected.relu() if "activation" in options else expected
    y = ours(x, r) if residual else ours(x)
    torch.testing.assert_close(y, expected)
    assert layout == "sliced_last" or y.stride() == x.stride()
    y.square().sum().backward(), expected.square().sum().backward()
    torch.testing.assert_close(x.grad, x_plain.grad)
    assert all(torch.equal(v, before[k]) for k, v in ours.state_dict().items())


def test_eval_of_one_value_and_of_none():
    layer = SyncBatchNorm(3).eval()
    assert layer(torch.ones(1, 3)).shape == (1, 3)
    assert layer(torch.ones(0, 3, 4, 4)).shape == (0, 3, 4, 4)


def test_eval_without_running_statistics_uses_the_batch():
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    layer = SyncBatchNorm(3, track_running_stats=False).eval()
    assert relative(layer(x).detach(), reference.batch_norm(x).y) < FLOAT32


def test_no_gradient_modes_update_statistics_and_keep_no_graph():
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    for mode in (torch.no_grad, torch.inference_mode):
        layer = SyncBatchNorm(3)
        with mode():
            y = layer(x)
        assert not y.requires_grad
        assert layer.num_batches_tracked == 1
        assert relative(layer.running_mean, 0.1 * x.double().mean((0, 2))) < FLOAT32
        layer(x).sum().backward()  # and training goes on afterwards
        assert layer.num_batches_tracked == 2


@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"residual": True, "activation": "relu"}], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced_last"])
@pytest.mark.parametrize("mean", [0.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_arguments_are_not_written_to(options, layout, mean, dtype):
    case = Case((3, 5, 6), (4,), dtype, mean=mean, **options)
    batch = whole_batch(case)
    given = [lay_out(t, layout) for t in (batch.x, batch.dy, batch.x if batch.residual is None else batch.residual)]
    copies = [t.clone() for t in given]
    x = given[0].requires_grad_()
    layer = make_layer(case)
    y = layer(x, given[2]) if case.residual else layer(x)
    y.backward(given[1])
    assert all(torch.equal(a.detach(), b) for a, b in zip(given, copies, strict=True))


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("follow", [lambda y, x: y.relu_(), lambda y, x: y.add_(x).relu_(), lambda y, x: y.mul_(2)])
def test_what_follows_may_work_in_place(follow):
    """conv -> bn -> relu_, and out += identity: the habits of ResNet code."""
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    grads = []
    for layer in (nn.BatchNorm2d(3), SyncBatchNorm(3)):
        leaf = x.clone().requires_grad_()
        follow(layer(leaf), leaf).pow(3).sum().backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[1], grads[0])


def test_input_overwritten_before_backward_is_noticed():
    x = torch.randn(4, 3, 5, 5).requires_grad_()
    moved = x * 1
    y = SyncBatchNorm(3)(moved)
    moved.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_backward_twice_through_a_retained_graph():
    x = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    y = SyncBatchNorm(3)(x).pow(3).sum()
    first = torch.autograd.grad(y, x, retain_graph=True)[0]
    second = torch.autograd.grad(y, x)[0]
    assert torch.equal(first, second)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("wanted", ["weight", "bias", "input"])
def test_one_gradient_alone(wanted):
    torch.manual_seed(0)
    x, plain, ours = torch.randn(4, 3, 5).requires_grad_(), nn.BatchNorm1d(3), SyncBatchNorm(3)
    found = []
    for layer in (plain, ours):
        loss = layer(x).pow(3).sum()
        target = x if wanted == "input" else getattr(layer, wanted)
        found.append(torch.autograd.grad(loss, target, retain_graph=True)[0])
        torch.autograd.grad(loss, x)
    torch.testing.assert_close(found[1], found[0])


def test_frozen_parameters():
    torch.manual_seed(0)
    x = torch.randn(4, 3, 5).requires_grad_()
    for frozen in (["weight"], ["bias"], ["weight", "bias"]):
        layer = SyncBatchNorm(3)
        for name in frozen:
            getattr(layer, name).requires_grad_(False)
        layer(x).pow(3).sum().backward()
        assert [name for name, p in layer.named_parameters() if p.grad is None] == frozen


def test_input_without_gradient():
    layer = SyncBatchNorm(3)
    layer(torch.randn(4, 3, 5)).pow(3).sum().backward()
    assert layer.weight.grad.abs().max() > 0


def test_nan_stays_in_its_channel():
    x = torch.randn(4, 3, 5)
    x[1, 1, 1] = float("nan")
    layer = SyncBatchNorm(3)
    y = layer(x)
    assert y[:, 1].isnan().all()
    assert not y[:, [0, 2]].isnan().any()
    assert layer.running_mean.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("shape", [(2, 1, 3, 3), (6, 3, 1, 1), (1, 3, 3, 2), (1, 1, 5, 5), (6, 3, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_dimensions_of_one(shape, layout):
    """Where a shape is contiguous and channels-last at once."""
    check(Case(shape[1:], (shape[0],), layout=layout, dy_layout="contiguous"))


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (0, 3, 4, 4), (2, 3, 0, 4), (2, 3, 4, 0, 2)], ids=str)
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_an_empty_batch_changes_nothing(shape, activation, momentum, dtype):
    layer = SyncBatchNorm(3, momentum=momentum, activation=activation)
    x = torch.empty(shape, dtype=dtype, requires_grad=True)
    y = layer(x, torch.empty(shape, dtype=dtype))
    assert (y.shape, y.dtype) == (x.shape, dtype)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert layer.weight.grad.tolist() == layer.bias.grad.tolist() == [0, 0, 0]
    assert layer.running_mean.tolist() == [0, 0, 0]
    assert layer.running_var.tolist() == [1, 1, 1]
    assert layer.num_batches_tracked.item() == 0


def test_cumulative_average_over_batches_with_an_empty_one_between():
    layer = SyncBatchNorm(2, momentum=None).double()
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, 2, generator=generator, dtype=torch.float64) for n in (5, 0, 7, 3)]
    for x in batches:
        layer(x)
    full = [x for x in batches if len(x)]
    torch.testing.assert_close(layer.running_mean, torch.stack([x.mean(0) for x in full]).mean(0))
    torch.testing.assert_close(layer.running_var, torch.stack([x.var(0) for x in full]).mean(0))
    assert layer.num_batches_tracked == 3


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1), (1, 3, 1, 1, 1)], ids=str)
def test_one_value_is_an_error_and_changes_nothing(shape):
    layer = SyncBatchNorm(3)
    with pytest.raises(ValueError, match="more than 1 value per channel") as caught:
        layer(torch.ones(shape))
    assert str(list(shape)) in str(caught.value)
    assert layer.num_batches_tracked.item() == 0
    assert layer.running_var.tolist() == [1, 1, 1]
