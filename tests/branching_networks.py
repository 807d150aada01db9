"""Networks with parallel branches, small, with the structure of well-known ones: what message grouping is tried on.

Written from their papers, of stock layers. Sizes: images of 32 x 32 and up.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvNorm(nn.Sequential):
    """Convolution, BatchNorm and, unless left out, ReLU."""

    def __init__(
        self, source: int, channels: int, kernel: int = 1, stride: int = 1, dilation: int = 1, relu: bool = True
    ) -> None:
        padding = dilation * (kernel // 2)
        conv = nn.Conv2d(source, channels, kernel, stride, padding, dilation, bias=False)
        super().__init__(conv, nn.BatchNorm2d(channels), *([nn.ReLU(inplace=True)] if relu else []))


class RepVGGBlock(nn.Module):
    """RepVGG in training form (Ding et al. 2021): a 3x3, a 1x1 and an identity branch, each with its norm, added."""

    def __init__(self, source: int, channels: int, stride: int) -> None:
        super().__init__()
        self.dense = ConvNorm(source, channels, 3, stride, relu=False)
        self.point = ConvNorm(source, channels, 1, stride, relu=False)
        self.identity = nn.BatchNorm2d(channels) if source == channels and stride == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, source, H, W) -> (N, channels, H/stride, W/stride)."""
        y = self.dense(x) + self.point(x)
        return F.relu(y if self.identity is None else y + self.identity(x))


class MobileOneBlock(nn.Module):
    """MobileOne in training form (Vasu et al. 2023): `copies` convolutions, a scale and an identity branch, added."""

    def __init__(self, source: int, channels: int, kernel: int, stride: int, copies: int, depthwise: bool) -> None:
        super().__init__()
        groups = source if depthwise else 1
        self.identity = nn.BatchNorm2d(channels) if source == channels and stride == 1 else None
        kernels = [kernel] * copies + ([1] if kernel > 1 else [])
        self.branches = nn.ModuleList(
            nn.Sequential(nn.Conv2d(source, channels, k, stride, k // 2, groups=groups), nn.BatchNorm2d(channels))
            for k in kernels
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, source, H, W) -> (N, channels, H/stride, W/stride)."""
        y = torch.zeros((), dtype=x.dtype) if self.identity is None else self.identity(x)
        for branch in self.branches:
            y = y + branch(x)
        return F.relu(y)


class Bottleneck(nn.Module):
    """ResNet's (He et al. 2016), with a downsample branch where the shape changes."""

    def __init__(self, source: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(source, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, 4 * width, 1, bias=False), nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        changes = stride > 1 or source != 4 * width
        self.downsample = ConvNorm(source, 4 * width, 1, stride, relu=False) if changes else None

    def forward(self, x: Tensor) -> Tensor:
        """(N, source, H, W) -> (N, 4 * width, H/stride, W/stride)."""
        identity = x
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        if self.downsample is not None:
            identity = self.downsample(x)
        y += identity
        return self.relu(y)


class ResNet(nn.Module):
    """Bottleneck stages; returns the last features, pooled, or those of every stage."""

    def __init__(self, width: int, depths: Sequence[int], all_stages: bool = False) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvNorm(3, width, 3, 2), nn.MaxPool2d(3, 2, 1))
        stages, source = [], width
        for i, depth in enumerate(depths):
            blocks = []
            for block in range(depth):
                blocks.append(Bottleneck(source, width << i, 2 if i and not block else 1))
                source = 4 * (width << i)
            stages.append(nn.Sequential(*blocks))
        self.stages, self.all_stages = nn.ModuleList(stages), all_stages

    def forward(self, x: Tensor) -> list[Tensor] | Tensor:
        """(N, 3, H, W) -> (N, C)."""
        x = self.stem(x)
        found = []
        for stage in self.stages:
            x = stage(x)
            found.append(x)
        return found if self.all_stages else x.mean((2, 3))


class HRModule(nn.Module):
    """HRNet's (Wang et al. 2020): a branch for each resolution, then each fused with all."""

    def __init__(self, widths: Sequence[int], blocks: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(*(BasicBlock(w) for _ in range(blocks))) for w in widths)
        self.fuse = nn.ModuleList(
            nn.ModuleList(self._path(widths, j, i) for j in range(len(widths))) for i in range(len(widths))
        )
        self.relu = nn.ReLU(inplace=True)

    @staticmethod
    def _path(widths: Sequence[int], source: int, target: int) -> nn.Module:
        if source == target:
            return nn.Identity()
        if source > target:
            scale = 2 ** (source - target)
            return nn.Sequential(ConvNorm(widths[source], widths[target], relu=False), nn.Upsample(scale_factor=scale))
        steps = [ConvNorm(widths[source], widths[source], 3, 2) for _ in range(target - source - 1)]
        return nn.Sequential(*steps, ConvNorm(widths[source], widths[target], 3, 2, relu=False))

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        """Features of each resolution, (N, C, H, W), (N, 2C, H/2, W/2), ..."""
        xs = [branch(x) for branch, x in zip(self.branches, xs, strict=True)]
        fused = []
        row: Any
        for row in self.fuse:
            y = row[0](xs[0])
            for j in range(1, len(xs)):
                y = y + row[j](xs[j])
            fused.append(self.relu(y))
        return fused


class BasicBlock(nn.Module):
    """ResNet's of two 3x3 convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.one, self.two = ConvNorm(width, width, 3), ConvNorm(width, width, 3, relu=False)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """(N, width, H, W), the same."""
        y = self.two(self.one(x))
        y += x
        return self.relu(y)


class HRNet(nn.Module):
    """Stages of two to four resolutions."""

    def __init__(self, width: int, modules: Sequence[int], blocks: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(ConvNorm(3, width, 3, 2), Bottleneck(width, width, 1))
        source = 4 * width
        self.transitions, self.stages = nn.ModuleList(), nn.ModuleList()
        for i, number in enumerate(modules):
            widths = [width << j for j in range(i + 2)]
            new = nn.ModuleDict({"new": ConvNorm(source, widths[-1], 3, 2)})
            if i == 0:
                new["first"] = ConvNorm(source, width, 3)
            self.transitions.append(new)
            self.stages.append(nn.Sequential(*(HRModule(widths, blocks) for _ in range(number))))
            source = widths[-1]

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C, H/2, W/2), all resolutions side by side."""
        xs = [self.stem(x)]
        transition: Any
        for transition, stage in zip(self.transitions, self.stages, strict=True):
            new = transition["new"](xs[-1])
            if "first" in transition:
                xs = [transition["first"](xs[0])]
            xs = stage([*xs, new])
        size = xs[0].shape[2:]
        return torch.cat([xs[0], *(F.interpolate(y, size=size, mode="bilinear") for y in xs[1:])], 1)


class DenseNet(nn.Module):
    """DenseNet's chain (Huang et al. 2017): every layer needs all before it, so there is nothing to group."""

    def __init__(self, growth: int, layers: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 2 * growth, 3, 2, 1, bias=False)
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.BatchNorm2d((i + 2) * growth),
                nn.ReLU(inplace=True),
                nn.Conv2d((i + 2) * growth, growth, 3, padding=1, bias=False),
            )
            for i in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, C)."""
        found = [self.stem(x)]
        for layer in self.layers:
            found.append(layer(torch.cat(found, 1)))
        return torch.cat(found, 1).mean((2, 3))


class ASPP(nn.Module):
    """DeepLabV3's atrous spatial pyramid pooling (Chen et al. 2017), on a short ResNet."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.backbone = ResNet(width, (1, 1), all_stages=True)
        source = 8 * width
        self.branches = nn.ModuleList(
            [ConvNorm(source, width), *(ConvNorm(source, width, 3, dilation=d) for d in (2, 4, 6))]
        )
        self.pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), ConvNorm(source, width))
        self.project = ConvNorm(5 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> (N, width, H/8, W/8)."""
        x = self.backbone(x)[-1]
        found = [branch(x) for branch in self.branches]
        found.append(F.interpolate(self.pooled(x), size=x.shape[-2:], mode="bilinear", align_corners=False))
        return self.project(torch.cat(found, dim=1))


class FeaturePyramid(nn.Module):
    """A feature pyramid (Lin et al. 2017) with norms, and one head of two layers that all its levels share."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.backbone = ResNet(width, (1, 1, 1, 1), all_stages=True)
        channels = [4 * (width << i) for i in range(4)]
        self.lateral = nn.ModuleList(ConvNorm(c, width, relu=False) for c in channels)
        self.output = nn.ModuleList(ConvNorm(width, width, 3) for _ in channels)
        self.head = nn.Sequential(ConvNorm(width, width, 3), ConvNorm(width, width, 3))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> one (N, width, h, w) for each level."""
        xs = [lateral(x) for lateral, x in zip(self.lateral, self.backbone(x), strict=True)]
        for i in range(len(xs) - 1, 0, -1):
            xs[i - 1] = xs[i - 1] + F.interpolate(xs[i], size=xs[i - 1].shape[-2:])
        return [self.head(output(x)) for output, x in zip(self.output, xs, strict=True)]


class TwoViews(nn.Module):
    """A contrastive network (Chen & He 2021): two views of the images through one backbone and one projector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.backbone = ResNet(width, (1, 1))
        features = 8 * width
        self.projector = nn.Sequential(
            *(nn.Linear(features, width), nn.BatchNorm1d(width), nn.ReLU()),
            *(nn.Linear(width, width), nn.BatchNorm1d(width, affine=False)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, 3, H, W) -> projections of the images and of their mirror images, (N, 2, width)."""
        views = (x, x.flip(-1))
        return torch.stack([self.projector(self.backbone(view)) for view in views], 1)


def rep_vgg(width: int = 8, depths: Sequence[int] = (1, 2, 4, 3)) -> nn.Module:
    """RepVGG in training form."""
    blocks, source = [RepVGGBlock(3, width, 2)], width
    for i, depth in enumerate(depths):
        for block in range(depth):
            blocks.append(RepVGGBlock(source, width << i, 1 if block else 2))
            source = width << i
    return nn.Sequential(*blocks)


def mobile_one(width: int = 8, depth: int = 4, copies: int = 4) -> nn.Module:
    """MobileOne in training form: depthwise and pointwise blocks by turns."""
    blocks = [MobileOneBlock(3, width, 3, 2, 1, depthwise=False)]
    for _ in range(depth):
        blocks += [MobileOneBlock(width, width, k, 1, copies, depthwise=k == 3) for k in (3, 1)]
    return nn.Sequential(*blocks)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "RepVGG": rep_vgg,
    "MobileOne": mobile_one,
    "HRNet": lambda: HRNet(4, (1, 1, 1), 2),
    "ResNet": lambda: ResNet(4, (2, 2, 2)),
    "DenseNet": lambda: DenseNet(4, 6),
    "DeepLabV3's ASPP": lambda: ASPP(4),
    "feature pyramid": lambda: FeaturePyramid(4),
    "two views": lambda: TwoViews(4),
}
