"""The public networks written down again from stock layers and plain functions: the truth for what is imported.

Their tables are in the public programs' own terms, their padding is explicit, and nothing here is the package's.
"""

import copy
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def scaled(channels, width):
    return max(8, int(channels * width / 8 + 0.5) * 8)


# ---- Cadene's bninception ------------------------------------------------------------------------

#           1x1, 3x3_reduce, 3x3, double_3x3_reduce, double_3x3, pool_proj, pool
CADENE_MODULES = {
    "3a": (64, 64, 64, 64, 96, 32, "avg"),
    "3b": (64, 64, 96, 64, 96, 64, "avg"),
    "3c": (0, 128, 160, 64, 96, 0, "halve"),
    "4a": (224, 64, 96, 96, 128, 128, "avg"),
    "4b": (192, 96, 128, 96, 128, 128, "avg"),
    "4c": (160, 128, 160, 128, 160, 128, "avg"),
    "4d": (96, 128, 192, 160, 192, 128, "avg"),
    "4e": (0, 128, 192, 192, 256, 0, "halve"),
    "5a": (352, 192, 320, 160, 224, 128, "avg"),
    "5b": (352, 192, 320, 192, 224, 128, "max"),
}


class CadeneBNInception(nn.Module):
    """Stock nn layers under Cadene's names, on even sizes."""

    def __init__(self, num_classes=1000, width=1.0):
        super().__init__()

        def add(name, source, channels, kernel=1, stride=1):
            channels = scaled(channels, width)
            self.add_module(name, nn.Conv2d(source, channels, kernel, stride, kernel // 2))
            self.add_module(f"{name}_bn", nn.BatchNorm2d(channels, eps=1e-5))
            return channels

        source = add("conv1_7x7_s2", 3, 64, 7, 2)
        source = add("conv2_3x3_reduce", source, 64)
        source = add("conv2_3x3", source, 192, 3)
        for module, (one, reduce, three, double_reduce, double, project, pool) in CADENE_MODULES.items():
            stride = 2 if pool == "halve" else 1
            name = f"inception_{module}"
            total = add(f"{name}_1x1", source, one) if one else 0
            total += add(f"{name}_3x3", add(f"{name}_3x3_reduce", source, reduce), three, 3, stride)
            inner = add(f"{name}_double_3x3_1", add(f"{name}_double_3x3_reduce", source, double_reduce), double, 3)
            total += add(f"{name}_double_3x3_2", inner, double, 3, stride)
            total += add(f"{name}_pool_proj", source, project) if project else source
            source = total
        self.last_linear = nn.Linear(source, num_classes)

    def unit(self, name, x):
        return F.relu(getattr(self, f"{name}_bn")(getattr(self, name)(x)))

    def features(self, x):
        x = F.max_pool2d(self.unit("conv1_7x7_s2", x), 3, 2, ceil_mode=True)
        x = self.unit("conv2_3x3", self.unit("conv2_3x3_reduce", x))
        x = F.max_pool2d(x, 3, 2, ceil_mode=True)
        for module, (one, *_, pool) in CADENE_MODULES.items():
            name = f"inception_{module}"
            parts = [self.unit(f"{name}_1x1", x)] if one else []
            parts.append(self.unit(f"{name}_3x3", self.unit(f"{name}_3x3_reduce", x)))
            y = self.unit(f"{name}_double_3x3_1", self.unit(f"{name}_double_3x3_reduce", x))
            parts.append(self.unit(f"{name}_double_3x3_2", y))
            if pool == "halve":
                parts.append(F.max_pool2d(x, 3, 2, ceil_mode=True))
            else:
                average = F.avg_pool2d(x, 3, 1, 1, ceil_mode=True, count_include_pad=True)
                pooled = average if pool == "avg" else F.max_pool2d(x, 3, 1, 1, ceil_mode=True)
                parts.append(self.unit(f"{name}_pool_proj", pooled))
            x = torch.cat(parts, 1)
        return x

    def forward(self, x):
        return self.last_linear(self.features(x).mean((2, 3)))


def cadene_network(num_classes=10, width=0.125, seed=0):
    """One whose running statistics are those of noise and whose gamma, beta and biases are of no special value."""
    torch.manual_seed(seed)
    network = CadeneBNInception(num_classes, width)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=math.sqrt(2 / parameter[0].numel()))
            else:
                parameter.normal_(mean=float("_bn.weight" in name), std=0.2)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        network(torch.randn(8, 3, 64, 64))
    return network.eval()


# ---- TF-slim's inception_v2 ----------------------------------------------------------------------

#            Branch_0;      Branch_1;             Branch_2;                   Branch_3 (pool, projection)
SLIM_MODULES = {
    "Mixed_3b": (64, (64, 64), (64, 96), ("avg", 32)),
    "Mixed_3c": (64, (64, 96), (64, 96), ("avg", 64)),
    "Mixed_4a": (None, (128, 160), (64, 96), None),
    "Mixed_4b": (224, (64, 96), (96, 128), ("avg", 128)),
    "Mixed_4c": (192, (96, 128), (96, 128), ("avg", 128)),
    "Mixed_4d": (160, (128, 160), (128, 160), ("avg", 96)),
    "Mixed_4e": (96, (128, 192), (160, 192), ("avg", 96)),
    "Mixed_5a": (None, (128, 192), (192, 256), None),
    "Mixed_5b": (352, (192, 320), (160, 224), ("avg", 128)),
    "Mixed_5c": (352, (192, 320), (192, 224), ("max", 128)),
}


class SlimInceptionV2:
    """Variables by TF-slim's names, as numpy arrays in TensorFlow's order, and a forward of plain functions.

    The first call on images makes the variables: random ones, with the moving statistics of these images.

    Args:
        num_classes: With the background.
        width: Factor on the channels.
        detection: As in the Object Detection API: BN with gamma everywhere, also on the first convolution; no logits.
        prefix: Of all names.
    """

    def __init__(self, num_classes=11, width=1.0, detection=False, prefix="InceptionV2/"):
        self.num_classes, self.width, self.detection, self.prefix = num_classes, width, detection, prefix
        self.variables = {}
        self.generator = torch.Generator().manual_seed(0)

    def double(self):
        """A copy in float64."""
        double = copy.copy(self)
        double.variables = {name: array.astype(np.float64) for name, array in self.variables.items()}
        return double

    def variable(self, name, make):
        key = self.prefix + name
        if key not in self.variables:
            self.variables[key] = make().numpy()
        return torch.from_numpy(self.variables[key])

    def normal(self, *shape, mean=0.0, std=0.2):
        return mean + std * torch.randn(shape, generator=self.generator)

    def weights(self, name, *shape):
        fan_in = shape[0] * shape[1] * (1 if "depthwise" in name else shape[2])
        return self.variable(name, lambda: self.normal(*shape, std=math.sqrt(2 / fan_in)))

    def norm_relu(self, scope, x):
        channels = x.shape[1]
        beta = self.variable(f"{scope}/BatchNorm/beta", lambda: self.normal(channels))
        mean = self.variable(f"{scope}/BatchNorm/moving_mean", lambda: x.mean((0, 2, 3)))
        variance = self.variable(f"{scope}/BatchNorm/moving_variance", lambda: x.var((0, 2, 3)))
        y = (x - mean.view(-1, 1, 1)) / (variance.view(-1, 1, 1) + 0.001).sqrt()
        if self.detection:
            y = y * self.variable(f"{scope}/BatchNorm/gamma", lambda: self.normal(channels, mean=1.0)).view(-1, 1, 1)
        return F.relu(y + beta.view(-1, 1, 1))

    def conv2d(self, scope, x, channels, kernel, stride=1):
        hwio = self.weights(f"{scope}/weights", kernel, kernel, x.shape[1], scaled(channels, self.width))
        return self.norm_relu(scope, F.conv2d(pad_same(x, kernel, stride), hwio.permute(3, 2, 0, 1), stride=stride))

    def first(self, x):
        scope, channels = "Conv2d_1a_7x7", scaled(64, self.width)
        deep = self.weights(f"{scope}/depthwise_weights", 7, 7, 3, 8)
        parts = [  # TensorFlow's definition: channel k * 8 + q is input channel k under filter q
            F.conv2d(pad_same(x, 7, 2)[:, k : k + 1], deep[:, :, k, q][None, None], stride=2)
            for k in range(3)
            for q in range(8)
        ]
        point = self.weights(f"{scope}/pointwise_weights", 1, 1, 24, channels)
        y = F.conv2d(torch.cat(parts, 1), point.permute(3, 2, 0, 1))
        if self.detection:
            return self.norm_relu(scope, y)
        return F.relu(y + self.variable(f"{scope}/biases", lambda: self.normal(channels)).view(-1, 1, 1))

    def mixed(self, name, x, one, three, double, pool):
        if pool is None:
            a = self.conv2d(f"{name}/Branch_0/Conv2d_0a_1x1", x, three[0], 1)
            a = self.conv2d(f"{name}/Branch_0/Conv2d_1a_3x3", a, three[1], 3, 2)
            b = self.conv2d(f"{name}/Branch_1/Conv2d_0a_1x1", x, double[0], 1)
            b = self.conv2d(f"{name}/Branch_1/Conv2d_0b_3x3", b, double[1], 3)
            b = self.conv2d(f"{name}/Branch_1/Conv2d_1a_3x3", b, double[1], 3, 2)
            return torch.cat([a, b, max_pool_same(x, 2)], 1)
        a = self.conv2d(f"{name}/Branch_0/Conv2d_0a_1x1", x, one, 1)
        b = self.conv2d(f"{name}/Branch_1/Conv2d_0a_1x1", x, three[0], 1)
        b = self.conv2d(f"{name}/Branch_1/Conv2d_0b_3x3", b, three[1], 3)
        c = self.conv2d(f"{name}/Branch_2/Conv2d_0a_1x1", x, double[0], 1)
        c = self.conv2d(f"{name}/Branch_2/Conv2d_0b_3x3", c, double[1], 3)
        c = self.conv2d(f"{name}/Branch_2/Conv2d_0c_3x3", c, double[1], 3)
        d = average_pool_same(x) if pool[0] == "avg" else max_pool_same(x, 1)
        return torch.cat([a, b, c, self.conv2d(f"{name}/Branch_3/Conv2d_0b_1x1", d, pool[1], 1)], 1)

    def __call__(self, x):
        x = max_pool_same(self.first(x), 2)
        x = self.conv2d("Conv2d_2c_3x3", self.conv2d("Conv2d_2b_1x1", x, 64, 1), 192, 3)
        x = max_pool_same(x, 2)
        for name, branches in SLIM_MODULES.items():
            x = self.mixed(name, x, *branches)
        if self.detection:
            return x
        x = x.mean((2, 3), keepdim=True)
        head = self.weights("Logits/Conv2d_1c_1x1/weights", 1, 1, x.shape[1], self.num_classes)
        bias = self.variable("Logits/Conv2d_1c_1x1/biases", lambda: self.normal(self.num_classes))
        return F.conv2d(x, head.permute(3, 2, 0, 1), bias)[:, :, 0, 0]


def largest_difference(network, reference, images, classes=slice(None)):
    """Of the outputs on images, over the largest output (or 1): both networks compute in float64.

    Args:
        network: Ours.
        reference: One of those above.
        images: (N, 3, H, W).
        classes: Those outputs of the reference that the network has.
    """
    with torch.no_grad():
        expected = copy.deepcopy(reference).double()(images.double())[:, classes]
        assert expected.std() > 0.01, "the outputs must tell networks apart"
        error = (copy.deepcopy(network).double()(images.double()) - expected).abs().max()
        return error.item() / max(1.0, expected.abs().max().item())


def pad_same(x, kernel, stride, value=0.0):
    """TensorFlow's SAME for a square: ceil(size / stride) outputs, the odd element of padding last."""
    size = x.shape[-1]
    assert x.shape[-2] == size
    total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
    before, after = total // 2, total - total // 2
    return F.pad(x, (before, after, before, after), value=value)


def max_pool_same(x, stride):
    return F.max_pool2d(pad_same(x, 3, stride, -math.inf), 3, stride)


def average_pool_same(x):
    """The mean over those elements of a 3x3 window that exist."""
    ones = F.pad(torch.ones_like(x), (1, 1, 1, 1))
    return F.avg_pool2d(F.pad(x, (1, 1, 1, 1)), 3, 1) / F.avg_pool2d(ones, 3, 1)


def slim_network(num_classes=11, width=0.5, **options):
    """With variables; narrower than about 0.4, slim's first convolution would have fewer filters a channel."""
    network = SlimInceptionV2(num_classes, width, **options)
    network(torch.randn(8, 3, 64, 64, generator=network.generator))
    return network
