"""The factory of Inception-BN, the network of Ioffe & Szegedy 2015 (arXiv 1502.03167), Figure 5."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from syncbn.models.network import InceptionBN, InceptionBNConfig, InceptionModule, Stem, changed_options
from syncbn.models.weights import Weights, network_with_weights, read_weights

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Networks that were pickled whole by earlier versions look for these two here.
__all__ = ["InceptionBN", "InceptionModule", "Stem", "inception_bn"]


def inception_bn(
    num_classes: int = 1000,
    variant: str = "paper",
    norm: str = "batch",
    activation: str = "relu",
    *,
    width_multiplier: float = 1.0,
    stem: str = "imagenet",
    local_response_norm: bool = False,
    dropout: float = 0.0,
    per_activation_head: int | tuple[int, int] | None = None,
    init_scale: float = 1.0,
    in_channels: int = 3,
    process_group: ProcessGroup | None = None,
    separable_stem: bool | None = None,
    stem_norm: bool | None = None,
    projection_4cd: int | None = None,
    conv_bias: bool | None = None,
    gamma: bool | None = None,
    padding: str | None = None,
    eps: float | None = None,
    momentum: float | None = None,
    weights: str | Path | Weights | None = None,
) -> InceptionBN:
    """Build Inception-BN (Ioffe & Szegedy 2015, Figure 5), freshly initialised or with weights of a file.

    Trainable parameters at width 1 and 1000 classes: "paper" 11,278,528; "cadene" 11,295,240, without its
    ``conv_bias`` 11,285,224; "slim" 11,178,336 as TF-slim has it (no gamma; the first convolution with a bias
    instead of BN: 68 normalised convolutions, 32 synchronisations), with ``stem_norm=True, gamma=True``
    11,188,288.

    Initialisation (the paper does not state it): :func:`syncbn.models.blocks.init_convolutions`; classifier
    N(0, 0.01^2); biases 0.

    Args:
        num_classes: number of logits.
        variant: "paper", "cadene" (Cadene's bninception, Caffe's layout) or "slim" (TF-slim's inception_v2).
        norm: "batch", or "none" for the plain Inception, whose convolutions all have a bias.
        activation: "relu" or "sigmoid".
        width_multiplier: factor on all channel counts, which are rounded to multiples of 8, at least 8.
        stem: "imagenet" (images from 32 pixels), or "small" (from 8, meant for 28 to 64; see :class:`Stem`).
        local_response_norm: GoogLeNet's, after the first pool and before the second (the paper's Inception
            and BN-Baseline).
        dropout: probability of dropping a feature before the classifier (the paper's Inception: 0.4).
        per_activation_head: size of the training images in pixels, (H, W) or H = W. Every layer of the last
            module, 5b, then has per-activation BN (section 4.2.3, ensemble: "in the last hidden layers"), and
            the network takes images of that size only.
        init_scale: factor on the standard deviation of all initial convolution weights (section 4.2.3 has it
            increased in some members of the ensemble; by how much is not stated).
        in_channels: channels of the images.
        process_group: the ranks that normalise together; None is all.
        separable_stem: this and those below replace attributes of the variant, see
            :class:`~syncbn.models.variants.VariantSpec`; None keeps them.
        stem_norm: whether BN follows the first convolution.
        projection_4cd: pool projections of 4c and 4d before width scaling.
        conv_bias: bias on convolutions before BN.
        gamma: whether BN learns a scale.
        padding: "symmetric" or "same".
        eps: BN's epsilon.
        momentum: BN's momentum in PyTorch's sense.
        weights: file of weights: Cadene's bninception, TF-slim's inception_v2 (TensorFlow's checkpoint or .npz), or
            our own (.ckpt, .safetensors, .pth); or what `syncbn.models.weights.read_weights` read of one. Arguments
            left at their defaults then follow the file, variant and width among them; ``num_classes`` always counts:
            the classifier is new where the file has another number.

    Returns:
        The network; images (N, in_channels, H, W) -> logits (N, num_classes).

    Raises:
        ValueError: for an argument outside these, naming it and what is accepted; or for weights that cannot be read
            or do not fit.
    """
    options = {name: value for name, value in locals().items() if name != "weights"}
    if weights is None:
        return InceptionBN(InceptionBNConfig(**options))
    content = weights if isinstance(weights, Weights) else read_weights(weights)
    return network_with_weights(content, num_classes, changed_options(options))
