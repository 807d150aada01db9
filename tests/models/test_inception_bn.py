"""Inception-BN against the paper's numbers and against a slow forward written from the table alone."""

import math

import pytest
import torch
import torch.nn.functional as F
from small_networks import SMALL, images, shake, trainable
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from syncbn.models import blocks, inception_bn
from syncbn.models.table import TABLE
from syncbn.nn import SyncBatchNorm

# ---- the numbers of the paper --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ({"variant": "cadene"}, 11_295_240),
        ({"variant": "cadene", "conv_bias": False}, 11_285_224),
        ({"variant": "paper"}, 11_278_528),
        ({"variant": "cadene", "conv_bias": False, "projection_4cd": 96}, 11_194_984),
        ({"variant": "paper", "projection_4cd": 96}, 11_188_288),
        ({"variant": "slim", "stem_norm": True, "gamma": True}, 11_188_288),
        # 9,952 gammas fewer; in the first convolution 64 biases instead of 64 betas.
        ({"variant": "slim"}, 11_188_288 - 9_952 - 64 + 64),
        # Without BN: the betas' place is taken by biases, the 10,016 gammas are gone.
        ({"variant": "paper", "norm": "none"}, 11_278_528 - 10_016),
    ],
)
def test_parameter_counts(arguments, count):
    with torch.device("meta"):
        assert trainable(inception_bn(**arguments)) == count


@pytest.mark.parametrize(
    ("variant", "layers", "channels"), [("paper", 69, 10_016), ("cadene", 69, 10_016), ("slim", 68, 9_888)]
)
def test_normalised_convolutions(variant, layers, channels):
    with torch.device("meta"):
        norms = [m for m in inception_bn(variant=variant).modules() if isinstance(m, SyncBatchNorm)]
    assert (len(norms), sum(m.num_features for m in norms)) == (layers, channels)


def test_at_224_pixels_shapes_multiply_adds_and_activations():
    network = inception_bn(variant="cadene").eval()
    shapes = {}
    for name, module in network.named_children():
        module.register_forward_hook(lambda _, __, out, name=name: shapes.__setitem__(name, tuple(out.shape)))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(images(1, 224))
    assert counter.get_total_flops() / 2 == pytest.approx(2.03e9, rel=2e-3)
    sizes = {"3a": 28, "3b": 28, "3c": 14, "4a": 14, "4b": 14, "4c": 14, "4d": 14, "4e": 7, "5a": 7, "5b": 7}
    channels = dict(zip(sizes, (256, 320, 576, 576, 576, 608, 608, 1056, 1024, 1024), strict=True))
    assert shapes.pop("stem") == (1, 192, 28, 28)
    assert shapes.pop("classifier") == (1, 1000)
    assert shapes.pop("pool") == shapes.pop("dropout") == (1, 1024)
    assert shapes == {f"inception_{k}": (1, channels[k], sizes[k], sizes[k]) for k in sizes}
    assert normalised_activations() == pytest.approx(3.74e6, rel=2e-3)


def normalised_activations():
    total = 64 * 112**2 + (64 + 192) * 56**2
    for row in TABLE:
        total += ((row.conv_1x1 or 0) + row.reduce_3x3 + row.reduce_double_3x3 + row.double_3x3) * row.size**2
        total += (row.projection or 0) * row.size**2
        total += (row.conv_3x3 + row.double_3x3) * (row.size // row.stride) ** 2
    return total


def test_projection_of_4c_and_4d_decides_the_channels():
    with torch.device("meta"):
        out = {v: inception_bn(variant=v).inception_4d.out_channels for v in ("paper", "cadene", "slim")}
    assert out == {"paper": 608, "cadene": 608, "slim": 576}


# ---- the fused network against a slow one --------------------------------------------------------


def slow_pad(x, kernel, stride, padding, value):
    """Pad as the variant's convolutions do, written from TensorFlow's documentation of SAME."""
    if padding == "symmetric":
        return F.pad(x, (kernel // 2,) * 4, value=value)
    pads = []
    for size in (x.shape[3], x.shape[2]):
        total = max(kernel - stride, 0) if size % stride == 0 else max(kernel - size % stride, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads, value=value)


class Slow:
    """Inception-BN branch by branch with F.conv2d and F.batch_norm, from a network's parameters by name."""

    def __init__(self, network, variant, activation, norm):
        self.p = dict(network.named_parameters())
        self.padding = "same" if variant == "slim" else "symmetric"
        self.eps = 1e-3 if variant == "slim" else 1e-5
        self.activation = getattr(torch, activation)
        self.norm = norm

    def conv(self, x, name, stride=1, groups=1):
        weight, bias = self.p[f"{name}.weight"], self.p.get(f"{name}.bias")
        x = slow_pad(x, weight.shape[-1], stride, self.padding, 0.0)
        return F.conv2d(x, weight, bias, stride, groups=groups)

    def unit(self, x, name, stride=1):
        if f"{name}.conv.depthwise.weight" in self.p:
            x = self.conv(x, f"{name}.conv.depthwise", stride, x.shape[1])
            x = self.conv(x, f"{name}.conv.pointwise")
        else:
            x = self.conv(x, f"{name}.conv", stride)
        if f"{name}.bn.weight" in self.p:
            gamma, beta = self.p[f"{name}.bn.weight"], self.p[f"{name}.bn.bias"]
            x = F.batch_norm(x, None, None, gamma, beta, training=True, eps=self.eps)
        return self.activation(x)

    def halving_pool(self, x):
        if self.padding == "symmetric":
            return F.max_pool2d(x, 3, 2, ceil_mode=True)
        return F.max_pool2d(slow_pad(x, 3, 2, "same", -math.inf), 3, 2)

    def pool(self, x, row):
        if row.stride == 2:
            return self.halving_pool(x)
        if row.pool == "max":
            return F.max_pool2d(x, 3, 1, 1)
        counts = F.avg_pool2d(F.pad(torch.ones_like(x), (1,) * 4), 3, 1) if self.padding == "same" else 1.0
        return F.avg_pool2d(F.pad(x, (1,) * 4), 3, 1) / counts

    def module(self, x, row):
        name, outputs = f"inception_{row.name}", []
        if row.conv_1x1 is not None:
            outputs.append(self.unit(x, f"{name}.branch_1x1"))
        y = self.unit(x, f"{name}.branch_3x3.reduce")
        outputs.append(self.unit(y, f"{name}.branch_3x3.spatial", row.stride))
        y = self.unit(x, f"{name}.branch_double_3x3.reduce")
        y = self.unit(y, f"{name}.branch_double_3x3.spatial_1")
        outputs.append(self.unit(y, f"{name}.branch_double_3x3.spatial_2", row.stride))
        y = self.pool(x, row)
        outputs.append(y if row.projection is None else self.unit(y, f"{name}.branch_pool.projection"))
        return torch.cat(outputs, 1)

    def __call__(self, x, lrn=False):
        def local_response_norm(x):
            return F.local_response_norm(x, 5, alpha=1e-4, beta=0.75, k=1.0) if lrn else x

        x = local_response_norm(self.halving_pool(self.unit(x, "stem.conv1", 2)))
        x = self.unit(self.unit(x, "stem.conv2_reduce"), "stem.conv2")
        x = self.halving_pool(local_response_norm(x))
        for row in TABLE:
            x = self.module(x, row)
        return F.linear(x.mean((2, 3)), self.p["classifier.weight"], self.p["classifier.bias"])


def gradients(network, output):
    names, parameters = zip(*((k, p) for k, p in network.named_parameters() if p.requires_grad), strict=True)
    return dict(zip(names, torch.autograd.grad(output.square().sum(), parameters), strict=True))


@pytest.mark.parametrize("variant", ["paper", "cadene", "slim"])
@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_equals_the_slow_forward(variant, norm, activation):
    network = shake(inception_bn(**SMALL, variant=variant, norm=norm, activation=activation).double())
    x = images(3, 64, dtype=torch.float64)
    fast, slow = network(x), Slow(network, variant, activation, norm)(x)
    assert_close(fast, slow)
    expected = gradients(network, slow)
    for name, gradient in gradients(network, fast).items():
        assert_close(gradient, expected[name], name)


def assert_close(actual, expected, name="output"):
    # 1e-10 of the tensor's size, or of 1 where the truth is 0 (a bias before BN has no gradient).
    error = (actual - expected).abs().max()
    assert error <= 1e-10 * max(1.0, expected.abs().max()), f"{name}: {error}"


def test_local_response_norm_switch():
    network = inception_bn(**SMALL, local_response_norm=True).double()
    x = images(2, 64, dtype=torch.float64)
    assert_close(network(x), Slow(network, "paper", "relu", "batch")(x, lrn=True))
    norms = [m for m in network.modules() if isinstance(m, nn.LocalResponseNorm)]
    assert [(m.size, m.alpha, m.beta) for m in norms] == [(5, 1e-4, 0.75)] * 2
    without = inception_bn(**SMALL).double()
    assert without.state_dict().keys() == network.state_dict().keys()
    without.load_state_dict(network.state_dict())
    assert not torch.allclose(without(x), network(x))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_format_goes_through(memory_format):
    network = inception_bn(**SMALL).to(memory_format=memory_format)
    assert network.forward_features(images(2, 64).to(memory_format=memory_format)).is_contiguous(
        memory_format=memory_format
    )


# ---- messages ------------------------------------------------------------------------------------


def count_messages(network, x, monkeypatch):
    real, started, finished = blocks.start_sync_batch_norm, [], []

    class Counted:
        def __init__(self, pending):
            self.pending = pending

        def finish(self):
            finished.append(1)
            return self.pending.finish()

    def start(layers, inputs, split):
        started.append([len(entry) if isinstance(entry, list) else 1 for entry in layers])
        return Counted(real(layers, inputs, split))

    monkeypatch.setattr(blocks, "start_sync_batch_norm", start)
    network(x)
    assert len(finished) == len(started)
    return started


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        ({"variant": "paper"}, 33),
        ({"variant": "cadene", "activation": "sigmoid"}, 33),
        ({"variant": "slim", "stem_norm": True}, 33),
        ({"variant": "slim"}, 32),
        ({"stem": "small"}, 33),
        ({"norm": "none"}, 0),
    ],
)
def test_messages(arguments, messages, monkeypatch):
    started = count_messages(inception_bn(**SMALL, **arguments), images(), monkeypatch)
    assert len(started) == messages
    if messages == 33:
        assert sum(map(sum, started)) == 69
        assert started[3:6] == [
            [3],
            [1, 1],
            [1, 1],
        ]  # 3a: siblings; double 3x3 and projection; the two outputs


class Logged(torch.autograd.Function):
    """The identity, noting when its backward runs."""

    @staticmethod
    def forward(ctx, x, log, event):
        ctx.log, ctx.event = log, event
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.log.append(ctx.event)
        return gradient, None, None


def test_work_between_start_and_finish_lies_between_them_in_backward_too(monkeypatch):
    """finish.backward launches a reduction and start.backward waits for it, so work must run in between."""
    module, log, messages = inception_bn(**SMALL).inception_3a, [], iter("123")
    real = blocks.start_sync_batch_norm

    def start(layers, inputs, split):
        number = next(messages)
        pending = real(layers, [Logged.apply(x, log, f"start {number}") for x in inputs], split)
        finish = pending.finish
        pending.finish = lambda: [Logged.apply(y, log, f"finish {number}") for y in finish()]
        return pending

    monkeypatch.setattr(blocks, "start_sync_batch_norm", start)
    units = {"conv 3x3": module.branch_3x3.spatial.conv, "projection": module.branch_pool}
    for event, work in units.items():
        work.register_forward_hook(lambda _, __, out, event=event: Logged.apply(out, log, event))
    module(torch.randn(2, 24, 8, 8)).sum().backward()
    order = [event for event, after in zip(log, [*log[1:], None], strict=True) if event != after]
    assert order == [
        *("finish 3", "start 3"),
        *("finish 2", "conv 3x3", "start 2"),
        *("finish 1", "projection", "start 1"),
    ]


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*")  # raised inside torch itself while it compiles
@pytest.mark.parametrize("norm", ["batch", "none"])
def test_compiles_whole(norm):
    network = inception_bn(**SMALL, norm=norm).double()  # in which rounding does not grow visible over 69 small norms
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(network, fullgraph=True, backend=backend)
    x = images().double()
    torch.testing.assert_close(compiled(x), network(x))
    assert len(graphs) == 1
