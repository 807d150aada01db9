"""Figure 5 of Ioffe & Szegedy 2015: the modules of Inception-BN."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ModuleRow:
    """One module: a line of Figure 5. Numbers are output channels; None where the branch is missing."""

    name: str
    size: int  # H = W of the input, for images of 224 pixels
    conv_1x1: int | None
    reduce_3x3: int
    conv_3x3: int
    reduce_double_3x3: int
    double_3x3: int  # of each of the two
    pool: str  # "avg" or "max"
    projection: int | None  # None: the pooled input passes through
    stride: int

    def out_channels(self, in_channels: int) -> int:
        """Channels of all branches together."""
        return (self.conv_1x1 or 0) + self.conv_3x3 + self.double_3x3 + (self.projection or in_channels)


STEM_CONV1, STEM_REDUCE, STEM_CONV2 = 64, 64, 192


DEPTH_MULTIPLIER = 8  # of the separable first convolution


# 4c and 4d by their filters, as printed. The size column's 576 channels would need projections of 96.
TABLE = (
    #         size  1x1  3x3: reduce, 3x3  double: reduce, 3x3  pool   proj  stride
    ModuleRow("3a", 28, 64, 64, 64, 64, 96, "avg", 32, 1),
    ModuleRow("3b", 28, 64, 64, 96, 64, 96, "avg", 64, 1),
    ModuleRow("3c", 28, None, 128, 160, 64, 96, "max", None, 2),
    ModuleRow("4a", 14, 224, 64, 96, 96, 128, "avg", 128, 1),
    ModuleRow("4b", 14, 192, 96, 128, 96, 128, "avg", 128, 1),
    ModuleRow("4c", 14, 160, 128, 160, 128, 160, "avg", 128, 1),
    ModuleRow("4d", 14, 96, 128, 192, 160, 192, "avg", 128, 1),
    ModuleRow("4e", 14, None, 128, 192, 192, 256, "max", None, 2),
    ModuleRow("5a", 7, 352, 192, 320, 160, 224, "avg", 128, 1),
    ModuleRow("5b", 7, 352, 192, 320, 192, 224, "max", 128, 1),
)


def scale_channels(channels: int, width_multiplier: float) -> int:
    """Multiply a channel count and round it to a multiple of 8, at least 8."""
    return max(8, int(channels * width_multiplier / 8 + 0.5) * 8)
