"""Networks of timm, torchvision and segmentation_models_pytorch: converted, they compute what they did.

Skipped, with the reason, where the package is not installed; `test_structures.py` has what their modules are made of.
"""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peers import import_peer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ranks import run_ranks
from syncbn import SyncBatchNorm, convert_sync_batchnorm, revert_sync_batchnorm

pytestmark = pytest.mark.filterwarnings("ignore")  # the packages' own business


def timm_model(name: str, **options: Any) -> nn.Module:
    return import_peer("timm").create_model(name, num_classes=3, **options)


def torchvision_model(name: str, **options: Any) -> nn.Module:
    import_peer("torchvision")
    models = import_peer("torchvision.models")
    return models.get_model(name, weights=None, num_classes=3, **options)


def segmentation_model(name: str, encoder: str) -> nn.Module:
    smp = import_peer("segmentation_models_pytorch")
    return getattr(smp, name)(encoder, encoder_weights=None, classes=3)


class Detector(nn.Module):
    """A RetinaNet whose output in training is its losses, summed over the images, with a box in each."""

    def __init__(self) -> None:
        super().__init__()
        import_peer("torchvision")
        detection = import_peer("torchvision.models.detection")
        utilities = import_peer("torchvision.models.detection.backbone_utils")
        backbone = utilities.resnet_fpn_backbone(
            backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
        )
        self.net = detection.RetinaNet(backbone, 3, min_size=64, max_size=64)

    def forward(self, images: Tensor) -> Tensor:
        if not self.training:
            return self.net.backbone(images)["0"]
        boxes = torch.tensor([[4.0, 4.0, 40.0, 44.0]], dtype=images.dtype)
        targets = [{"boxes": boxes, "labels": torch.tensor([1])} for _ in images]
        losses = self.net(list(images), targets)
        return (losses["classification"] + losses["bbox_regression"]) * len(images)


SMP = "segmentation_models_pytorch"
NETWORKS: dict[str, tuple[str, Callable[[], nn.Module], int]] = {
    # package, network, pixels
    "timm efficientnet_b0": ("timm", lambda: timm_model("efficientnet_b0", drop_path_rate=0.0), 32),
    "timm resnetv2_18d": ("timm", lambda: timm_model("resnetv2_18d"), 32),
    "torchvision mobilenet_v3": ("torchvision", lambda: torchvision_model("mobilenet_v3_small"), 64),
    "torchvision retinanet": ("torchvision", Detector, 64),
    "smp DeepLabV3Plus": (SMP, lambda: segmentation_model("DeepLabV3Plus", "mobilenet_v2"), 64),
}
BATCH = 4


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    net = NETWORKS[name][1]().double()
    for module in net.modules():
        if isinstance(module, (nn.Dropout, nn.Dropout2d)):
            module.p = 0.0  # each rank draws its own
    return net


def images_of(name: str) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(BATCH, 3, *2 * [NETWORKS[name][2]], dtype=torch.float64)


def output_of(net: nn.Module, images: Tensor) -> Tensor:
    output = net(images)
    return output["out"] if isinstance(output, dict) else output


def train_step(net: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Output, gradients and buffers of one step on a loss that is a sum over the images."""
    output = output_of(net.train(), images)
    loss = output if isinstance(net, Detector) else output.square().sum()
    loss.backward()
    gradients = {f"gradient of {name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {"output": output.detach(), **gradients, **dict(net.named_buffers())}


def differences(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """The tensors that differ, and by how much, relative to their largest number, or to that of all gradients."""
    assert found.keys() == expected.keys()
    largest = {name: float(true.double().abs().max()) for name, true in expected.items()}
    gradient = max((value for name, value in largest.items() if name.startswith("gradient")), default=0.0)
    worst = {}
    for name, true in expected.items():
        # Some running means are 0, but for rounding.
        scale = gradient if name.startswith("gradient") else max(largest[name], 0.01)
        worst[name] = float((found[name] - true).double().abs().max()) / scale
    return {name: value for name, value in worst.items() if not value <= 1e-10}


@pytest.mark.parametrize("name", NETWORKS)
def test_equal_before_and_after(name):
    net, twin, images = build(name), build(name), images_of(name)
    kinds = [type(module) for module in net.modules()]
    convert_sync_batchnorm(twin)
    layers = [module for module in twin.modules() if isinstance(module, _BatchNorm)]
    assert layers and all(isinstance(layer, SyncBatchNorm) for layer in layers)
    with torch.no_grad():
        expected, found = output_of(net.eval(), images), output_of(twin.eval(), images)
    assert not differences({"output": found}, {"output": expected})
    assert not differences(train_step(twin, images), train_step(net, images))
    revert_sync_batchnorm(twin)
    assert [type(module) for module in twin.modules()] == kinds
    copy.deepcopy(twin)


def share(rank: int, name: str) -> dict[str, Tensor]:
    net = convert_sync_batchnorm(build(name))
    half = BATCH // 2
    return train_step(net, images_of(name)[rank * half : (rank + 1) * half])


@pytest.mark.parametrize("name", NETWORKS)
def test_two_ranks_are_one(name):
    import_peer(NETWORKS[name][0])
    expected = train_step(build(name), images_of(name))
    ranks = run_ranks(share, 2, name)
    assert not differences({key: together(key, [rank[key] for rank in ranks]) for key in expected}, expected)
    for key in expected:
        if not key.startswith(("gradient", "output")):
            assert torch.equal(ranks[0][key], ranks[1][key]), key


def together(key: str, parts: list[Tensor]) -> Tensor:
    """What two ranks' tensors should make up: the outputs side by side, the gradients' sum, the same buffer."""
    if key.startswith("gradient") or (parts[0].ndim == 0 and key == "output"):
        return parts[0] + parts[1]
    return torch.cat(parts) if key == "output" else parts[0]
