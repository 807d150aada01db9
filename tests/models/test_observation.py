"""What is seen of layers that a network runs together is what each of them sees when it is called by itself."""

from collections import defaultdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from syncbn.models.blocks import ConvNorm
from syncbn.models.inception_bn import inception_bn
from syncbn.models.network import InceptionModule
from syncbn.models.observation import is_observed, observe_inputs, observe_outputs


def one_by_one(module: InceptionModule, x: Tensor) -> Tensor:
    """The module as Figure 3 of GoogLeNet's paper draws it: every layer is called."""

    def unit(layers: ConvNorm, x: Tensor) -> Tensor:
        return layers.activate(layers.bn(layers.conv(x)))

    pool = module.branch_pool
    assert pool.stride == 1 and pool.projection is not None and module.branch_1x1 is not None
    pooled = F.avg_pool2d(x, 3, 1, 1) if pool.kind == "avg" else F.max_pool2d(x, 3, 1, 1)
    double = module.branch_double_3x3
    branches = [
        unit(module.branch_1x1, x),
        unit(module.branch_3x3.spatial, unit(module.branch_3x3.reduce, x)),
        unit(double.spatial_2, unit(double.spatial_1, unit(double.reduce, x))),
        unit(pool.projection, pooled),
    ]
    return torch.cat(branches, dim=1)


def seen(module: InceptionModule, run: Any, x: Tensor) -> tuple[dict[str, list[Tensor]], Tensor]:
    """Inputs and outputs of all convolutions and norms while the module runs, and what it returns."""
    found = defaultdict(list)
    layers = {n: layer for n, layer in module.named_modules() if n.rpartition(".")[2] in ("conv", "bn")}
    handles = []
    for name, layer in layers.items():
        handles += observe_inputs(layer, found[f"{name} in"].append)
        handles += observe_outputs(layer, found[f"{name} out"].append)
    output = run(x)
    for handle in handles:
        handle.remove()
    assert not any(is_observed(layer) or layer._forward_hooks for layer in layers.values())
    return found, output


@pytest.mark.parametrize("options", [{}, {"norm": "none"}, {"variant": "cadene"}, {"per_activation_head": 32}])
@pytest.mark.parametrize("name", ["inception_4a", "inception_5b"])  # average pool, max pool
def test_grouped_layers_show_what_they_would_see_if_called(name, options):
    torch.manual_seed(0)
    network = inception_bn(10, width_multiplier=0.125, stem="small", **options).double().train()
    module = getattr(network, name)
    [x] = seen_input(network, module)
    grouped, output = seen(module, module, x)
    called, expected = seen(module, lambda x: one_by_one(module, x), x)
    torch.testing.assert_close(output, expected)
    assert len(grouped) == 28 and grouped.keys() == called.keys()
    for layer, tensors in called.items():
        assert len(tensors) == len(grouped[layer]) == 1, layer
        torch.testing.assert_close(grouped[layer][0], tensors[0], msg=layer)
        assert not grouped[layer][0].requires_grad


def seen_input(network: Any, module: InceptionModule) -> list[Tensor]:
    inputs: list[Tensor] = []
    handles = observe_inputs(module, inputs.append)
    with torch.no_grad():
        network(torch.randn(4, 3, 32, 32, dtype=torch.float64))
    for handle in handles:
        handle.remove()
    return inputs
