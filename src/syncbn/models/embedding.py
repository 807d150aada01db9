"""Images as points on a sphere, for retrieval: a head in the place of the classifier, and the loss's logits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from syncbn.models.network import InceptionBN
from syncbn.models.variants import require


class GlobalAverageMaxPool(nn.Module):
    """Sum of the average and the maximum over the positions: (N, C, H, W) -> (N, C)."""

    def forward(self, features: Tensor) -> Tensor:
        """Pool."""
        return features.mean(dim=(2, 3)) + features.amax(dim=(2, 3))


class EmbeddingHead(nn.Module):
    """Embeds features: a linear map, then L2 norm 1.

    Args:
        in_features: Channels of the pooled features.
        dimension: Of the embedding.
    """

    def __init__(self, in_features: int, dimension: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(in_features, dimension)

    def embed(self, features: Tensor) -> Tensor:
        """Embeddings of L2 norm 1: (N, in_features) -> (N, dimension)."""
        return F.normalize(self.embedding(features))

    def forward(self, features: Tensor) -> Tensor:
        """The same as `embed`."""
        return self.embed(features)


class ProxyHead(EmbeddingHead):
    """Embeds features, and compares the embedding with one learned proxy of each class.

    Cross-entropy of its logits is the normalised softmax loss (Zhai and Wu 2019, "Classification is a strong baseline
    for deep metric learning", arXiv 1811.12649, section 3.1). Unlike losses over pairs or whole batches it is a mean
    over images, and so the same on any number of ranks.

    Args:
        in_features: Channels of the pooled features.
        num_classes: Classes of the training images.
        dimension: Of the embedding.
        temperature: Divides the cosines.
    """

    def __init__(self, in_features: int, num_classes: int, dimension: int, temperature: float) -> None:
        super().__init__(in_features, dimension)
        self.temperature = temperature
        self.proxies = nn.Parameter(torch.randn(num_classes, dimension))

    def forward(self, features: Tensor) -> Tensor:
        """Logits (N, num_classes): cosines of embedding and proxies, over the temperature."""
        return self.embed(features) @ F.normalize(self.proxies).T / self.temperature


def put_proxy_head(network: InceptionBN, num_classes: int, dimension: int, temperature: float) -> None:
    """Replace the global average pool and the classifier of a network, in place, by pool and head to be trained.

    Raises:
        ValueError: ``dimension`` or ``temperature`` is out of range.
    """
    require(dimension >= 1, "embedding_dimension", dimension, "at least 1")
    require(temperature > 0, "embedding_temperature", temperature, "positive")
    network.classifier = ProxyHead(network.classifier.in_features, num_classes, dimension, temperature)
    network.pool = GlobalAverageMaxPool()


def put_embedding_head(network: InceptionBN, dimension: int) -> None:
    """Replace the global average pool and the classifier of a network, in place: its outputs are then embeddings."""
    network.classifier = EmbeddingHead(network.classifier.in_features, dimension)
    network.pool = GlobalAverageMaxPool()


def embed(network: InceptionBN, images: Tensor) -> Tensor:
    """Embeddings (N, dimension) of images (N, C, H, W), by a network that has such a head."""
    assert isinstance(network.classifier, EmbeddingHead)
    return network.classifier.embed(network.pool(network.forward_features(images)))
