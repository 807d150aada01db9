"""Activations made again in the backward: the same gradients bit by bit, less memory, and nobody's hooks disturbed."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import syncbn
from ranks import run_ranks
from syncbn import recomputing
from syncbn.benchmarks.gpu.layer import CUDNN
from syncbn.benchmarks.gpu.step import KEPT, StepSetting
from syncbn.benchmarks.harness.live_tensors import live_bytes
from syncbn.benchmarks.harness.measure import OURS
from syncbn.benchmarks.memory import measure_courses
from syncbn.models import inception_bn
from syncbn.models.blocks import max_pool_halving
from syncbn.nn import BatchNorm

BIG = 2**20  # bytes of an activation of `block`


def same(found, expected):
    return all(
        (a is None and b is None) or (a is not None and torch.equal(a, b)) for a, b in zip(found, expected, strict=True)
    )


def network_gradients(rank, recompute, **options):
    """Of the images and all parameters; and the buffers."""
    torch.manual_seed(0)
    network = inception_bn(5, width_multiplier=0.125, stem="small", **options)
    network.recompute_activations = recompute
    images = torch.randn(4, 3, 28, 28, generator=torch.Generator().manual_seed(rank), requires_grad=True)
    loss = F.cross_entropy(network(images), torch.tensor([0, 1, 2, 3]))
    leaves = [images, *(p for p in network.parameters() if p.requires_grad)]
    return [*torch.autograd.grad(loss, leaves), *network.buffers()]


@pytest.mark.parametrize("options", [{}, {"variant": "slim"}, {"activation": "sigmoid"}, {"norm": "none"}], ids=str)
def test_a_network_has_the_same_gradients(options):
    kept, recomputed = (network_gradients(0, again, **options) for again in (False, True))
    assert same(recomputed, kept)


def compared_on_a_rank(rank):
    return same(*(network_gradients(rank, again) for again in (False, True)))


def test_so_on_ranks():
    assert run_ranks(compared_on_a_rank, 2) == [True, True]


def test_a_second_backward_through_the_same_graph():
    def twice(again):
        block, x = Block(), images().requires_grad_()
        with syncbn.recompute_activations(again):
            loss = block(x).square().mean()
        loss.backward(retain_graph=True)
        loss.backward()
        return [x.grad, *(p.grad for p in block.parameters())]

    assert same(twice(True), twice(False))


def test_second_derivatives():
    def of(again):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(2, 4, 3), BatchNorm(4, activation="relu"), nn.Conv2d(4, 3, 3)).double()
        x = torch.randn(3, 2, 7, 7, dtype=torch.float64, requires_grad=True)
        with syncbn.recompute_activations(again):
            loss = net(x).square().mean()
        (dx,) = torch.autograd.grad(loss, x, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), [x, *net.parameters()], allow_unused=True)

    assert same(of(True), of(False))


def test_the_memory_of_a_training_step():
    """At a quarter of the width, where images, indices and weights count for more than at full width (0.50)."""
    peaks = {name: max(course) for name, course in measure_courses(StepSetting(32, 224, 0.25, "cpu")).items()}
    assert peaks[OURS] <= 0.6 * peaks[CUDNN]
    assert peaks[KEPT] <= 0.97 * peaks[CUDNN]


class Block(nn.Module):
    """Two units; each activation has BIG bytes. `change` gets the first layer's output."""

    def __init__(self, layer=BatchNorm, change=None):
        super().__init__()
        torch.manual_seed(0)
        self.units = nn.ModuleList([nn.Conv2d(4, 4, 3, padding=1, bias=False) for _ in range(2)])
        self.norms = nn.ModuleList([layer(4, activation="relu") for _ in range(2)])
        self.change = change

    def forward(self, x):
        x = self.norms[0](self.units[0](x))
        if self.change is not None:
            x = self.change(x)
        return self.norms[1](self.units[1](x))


def images():
    return torch.randn(4, 4, 128, 128, generator=torch.Generator().manual_seed(0))


def block_gradients(again, **options):
    block = Block(**options)
    x = images().requires_grad_()
    with syncbn.recompute_activations(again):
        y = block(x)
    return torch.autograd.grad(y.square().mean(), [x, *block.parameters()])


def changed_in_place(x):
    return x.mul_(2)


def changed_behind_the_back(x):
    with torch.no_grad():
        x.mul_(2)
    return x


def changed_after_a_copy(x):
    return x.clone().mul_(2)


def a_part_and_its_rest(x):
    return torch.cat([x[:, :1], 2 * x[:, 1:]], dim=1)


def its_bits(x):
    return x * x.view(torch.int32).sign()


@pytest.mark.parametrize(
    "change", [None, changed_in_place, changed_behind_the_back, changed_after_a_copy, a_part_and_its_rest, its_bits]
)
def test_whatever_happens_to_an_output_before_it_is_saved(change):
    assert same(block_gradients(True, change=change), block_gradients(False, change=change))


def test_an_output_changed_after_it_was_saved_is_the_one_that_was_saved():
    """torch itself would refuse the backward."""
    block, found = Block(), []
    for again in (False, True):
        x = images().requires_grad_()
        with syncbn.recompute_activations(again):
            y = block.norms[0](block.units[0](x))
            z = block.units[1](y)
        if again:
            with torch.no_grad():
                y.zero_()
        found.append(torch.autograd.grad(z.square().mean(), [x, *block.units.parameters()]))
    assert same(*found)


def test_views_of_an_output_share_what_is_made_again():
    made = []

    def gradients(again):
        torch.manual_seed(0)
        layer, convs = BatchNorm(4, activation="relu"), [nn.Conv2d(2, 3, 3) for _ in range(2)]
        x = images().requires_grad_()
        with syncbn.recompute_activations(again):
            y = layer(x)
            if again:
                outputs = y.grad_fn.outputs_again
                make = outputs.make
                outputs.make = lambda *arguments: made.append(1) or make(*arguments)
            parts = y.split(2, dim=1)
            z = sum(conv(part) for conv, part in zip(convs, parts, strict=True))
        return torch.autograd.grad(z.square().mean(), [x, *layer.parameters(), *convs[0].parameters()])

    assert same(gradients(True), gradients(False))
    assert made == [1]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_with_activation_checkpointing(reentrant, inside):
    """In a checkpoint, and around one; statistics must be updated once in each case."""

    def gradients(again):
        block = Block(syncbn.SyncBatchNorm)
        x = images().requires_grad_()
        if inside:

            def forward(x):
                with syncbn.recompute_activations(again):
                    return block(x)

            y = checkpoint(forward, x, use_reentrant=reentrant)
        else:
            with syncbn.recompute_activations(again):
                y = block.norms[1](checkpoint(block, x, use_reentrant=reentrant))
        y.square().mean().backward()  # a reentrant checkpoint knows no autograd.grad
        return [x.grad, *(p.grad for p in block.parameters()), *block.buffers()]

    assert same(gradients(True), gradients(False))


def test_hooks_of_others_are_left_alone():
    packed = []

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor

    block = Block()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with syncbn.recompute_activations():
            block(images().requires_grad_())
        count = len(packed)
        block(images().requires_grad_())
    assert len(packed) == 2 * count > 0


def test_a_residual_layer_keeps_its_output():
    def gradients(again):
        torch.manual_seed(0)
        layer, conv = BatchNorm(4, activation="relu"), nn.Conv2d(4, 4, 3)
        x, residual = images().requires_grad_(), images().sin_().requires_grad_()
        with syncbn.recompute_activations(again):
            y = conv(layer(x, residual))
        return torch.autograd.grad(y.square().mean(), [x, residual, *layer.parameters(), *conv.parameters()])

    assert same(gradients(True), gradients(False))


def test_nothing_is_left_after_the_backward():
    """Neither an activation nor a node: no cycle keeps them until the collector comes."""
    gc.disable()
    try:
        block = Block()
        with syncbn.recompute_activations():
            y = block.norms[0](block.units[0](images().requires_grad_()))
            node = weakref.ref(y.grad_fn)
            loss = block.norms[1](block.units[1](y)).square().mean()
        loss.backward()
        del y, loss
        assert node() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("activation", ["relu", None])
def test_the_output_is_not_kept(activation):
    """Of the four activations of two units, the inputs of the norms are."""

    def peak(again):
        torch.manual_seed(0)
        layers = [nn.Conv2d(4, 4, 3, padding=1, bias=False), BatchNorm(4, activation=activation)] * 4
        net, x = nn.Sequential(*layers), images()

        def step():
            with syncbn.recompute_activations(again):
                kept.append(net(x))

        kept = []
        found = live_bytes(lambda: step)
        return found[-1] - found[0]

    assert peak(True) <= peak(False) - 3 * BIG


def test_off_without_gradients_and_where_it_is_disabled():
    x = images().requires_grad_()
    with torch.no_grad(), syncbn.recompute_activations():
        assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
    with syncbn.recompute_activations(False):
        assert torch._C._autograd._top_saved_tensors_default_hooks(False) is None
        y = Block()(x)
    y.sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(("size", "saved"), [((12, 10), 2), ((200, 200), 4)], ids=str)
def test_indices_of_pools_in_fewer_bytes(size, saved):
    kept = {}

    def gradient(again):
        x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0), requires_grad=True)
        with syncbn.recompute_activations(again):
            kept[again] = live_bytes(lambda: lambda: outputs.append(max_pool_halving(x, odd_padding=True)))[-1]
        return torch.autograd.grad(outputs[-1].square().sum(), x)

    outputs = []
    assert same(gradient(True), gradient(False))
    pooled = outputs[-1].numel()
    assert kept[False] == 2 * pooled * (4 + 8)  # of two calls
    assert kept[True] == 2 * pooled * (4 + saved)


def small_network():
    torch.manual_seed(0)
    return inception_bn(5, width_multiplier=0.125, stem="small")


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_network_without_gradients_inside(mode):
    """As a teacher's, whose features then keep nothing else alive."""
    network, x = small_network().eval(), images()[:, :3]
    with mode():
        expected = network.forward_features(x)
    with syncbn.recompute_activations(), mode():
        features = network.forward_features(x)
    assert torch.equal(features, expected)
    assert features not in recomputing._joined


def test_under_torch_func_activations_are_kept():
    network, x = small_network().eval(), images()[:, :3]
    network.recompute_activations = True

    def loss(parameters):
        return torch.func.functional_call(network, parameters, (x,)).sum()

    gradients = torch.func.grad(loss)(dict(network.named_parameters()))
    assert all(g.isfinite().all() for g in gradients.values())


def test_features_can_be_saved(tmp_path):
    network = small_network()
    network.recompute_activations = True
    features = network.forward_features(images()[:, :3])
    torch.save(features, tmp_path / "features.pt")
    assert torch.equal(torch.load(tmp_path / "features.pt"), features)


def test_functions_of_others_may_call_their_attributes_as_they_like():
    class Own(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.versions = ctx.outputs_again = [0]
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            return dy

    x, conv = images().requires_grad_(), nn.Conv2d(4, 2, 3)
    with syncbn.recompute_activations():
        conv(Own.apply(x)).sum().backward()
    assert x.grad is not None


def test_a_view_without_a_gradient_outlives_the_layer():
    layer, conv, x = BatchNorm(4, activation="relu"), nn.Conv2d(4, 2, 3), images().requires_grad_()
    with syncbn.recompute_activations():
        y = layer(x)
        with torch.no_grad():
            part = y[:2]
        z = conv(part)
    y.mean().backward()
    z.sum().backward()
    assert conv.weight.grad is not None
