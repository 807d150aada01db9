"""What other projects' networks are made of, in one: converted it computes what it did, and two ranks are one."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ranks import run_ranks
from syncbn import SyncBatchNorm, convert_sync_batchnorm

BATCH = 6


class ConvNormActivation(nn.Sequential):
    """As torchvision's: a subclass of Sequential."""

    def __init__(self, source: int, channels: int) -> None:
        super().__init__(
            nn.Conv2d(source, channels, 3, padding=1), nn.BatchNorm2d(channels), nn.Hardswish(inplace=True)
        )


class FusedNorm(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: the activation is in the layer, in place."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3, momentum=0.01)
        self.drop, self.act = nn.Identity(), nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


class FrozenBatchNorm2d(nn.Module):
    """As torchvision's and detectron2's: buffers only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias)


class Mixture(nn.Module):
    """Shared layers, 1, 2 and 3 dimensions, a ModuleDict, a frozen layer, a layer in eval mode, a forward hook."""

    def __init__(self, fused: type[nn.Module]) -> None:
        super().__init__()
        self.stem = ConvNormActivation(3, 8)
        self.fused = fused(8)
        self.shared = nn.BatchNorm2d(8, momentum=None)
        self.branches = nn.ModuleDict({"one": nn.Conv2d(8, 8, 1), "norm": self.shared})
        self.frozen = FrozenBatchNorm2d(8)
        self.still = nn.BatchNorm2d(8)
        self.volume = nn.BatchNorm3d(4)
        self.head = nn.BatchNorm1d(8, affine=False)
        self.stem.register_forward_hook(lambda module, inputs, output: output * 1.5)

    def train(self, mode: bool = True) -> "Mixture":
        super().train(mode)
        self.still.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = self.fused(self.stem(x))
        x = self.shared(x) + self.branches["norm"](self.branches["one"](x))
        x = self.still(self.frozen(x))
        x = self.volume(x.unflatten(1, (4, 2))).flatten(1, 2)
        return self.head(x.mean((2, 3)))


def build() -> Mixture:
    """Named as timm's, whose layer is known by its name."""
    torch.manual_seed(0)
    return Mixture(type("BatchNormAct2d", (FusedNorm,), {"__module__": "timm.layers.norm_act"})).double().train()


def step(net: Mixture, images: Tensor) -> dict[str, Tensor]:
    output = net(images)
    (output.pow(3) + output).sum().backward()
    gradients = {f"gradient {name}": p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {"output": output.detach()} | gradients | dict(net.named_buffers())


def images() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(BATCH, 3, 8, 8, dtype=torch.float64) * 2 + 1


def share(rank: int) -> dict[str, Tensor]:
    return step(convert_sync_batchnorm(build()), images()[2:] if rank else images()[:2])


def test_equal_before_and_after():
    net = convert_sync_batchnorm(build())
    synchronised = [name for name, module in net.named_modules() if isinstance(module, SyncBatchNorm)]
    assert synchronised == ["stem.1", "fused", "shared", "still", "volume", "head"]
    twin = build()
    found, expected = step(net, images()), step(twin, images())
    assert found.keys() == expected.keys()
    for name, true in expected.items():
        torch.testing.assert_close(found[name], true, rtol=1e-10, atol=1e-10, msg=name)
    torch.testing.assert_close(net.eval()(images()), twin.eval()(images()), rtol=1e-10, atol=1e-10)


def test_two_ranks_with_unequal_shares_are_one():
    ranks, expected = run_ranks(share, 2), step(build(), images())
    for name, true in expected.items():
        parts = [rank[name] for rank in ranks]
        if name == "output":
            found = torch.cat(parts)
        elif name.startswith("gradient"):
            found = parts[0] + parts[1]
        else:
            assert torch.equal(*parts), name
            found = parts[0]
        torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-10, msg=name)
