"""Recall@k: whether an image's neighbours are of its class."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.data import dim_zero_cat

from syncbn.ops import as_statistic, beside

NEIGHBOURS = (1, 2, 4, 8)
ROWS_AT_A_TIME = 1024


class RecallAtK(Metric):
    """Share of images with an image of their own class among the k nearest others, over all ranks.

    What retrieval calls recall@k (Song et al. 2016, arXiv 1511.06452) is what torchmetrics calls RetrievalHitRate; that
    one takes a score for every pair of images, this one an embedding for each image. An image that is alone in its
    class counts as a miss.

    Args:
        neighbours: The k's.
    """

    full_state_update = False
    embeddings: list[Tensor]
    labels: list[Tensor]

    def __init__(self, neighbours: Sequence[int] = NEIGHBOURS) -> None:
        super().__init__()
        self.neighbours = tuple(neighbours)
        self.add_state("embeddings", [], dist_reduce_fx="cat")
        self.add_state("labels", [], dist_reduce_fx="cat")

    def update(self, embeddings: Tensor, labels: Tensor) -> None:
        """Add images.

        Args:
            embeddings: Of L2 norm 1, shape (N, D); N may be 0, and must not be left out on a rank without an image.
            labels: int64, shape (N,).
        """
        self.embeddings.append(embeddings)
        self.labels.append(labels)

    def compute(self) -> dict[int, Tensor]:
        """From each k to the recall, 0..1; NaN where there is no image."""
        embeddings, labels = dim_zero_cat(self.embeddings), dim_zero_cat(self.labels)
        most = min(max(self.neighbours), len(labels) - 1)
        if most < 1:
            return {k: embeddings.new_tensor(0.0 if len(labels) else float("nan")) for k in self.neighbours}
        hits = torch.cat([_hits(embeddings, labels, first, most) for first in range(0, len(labels), ROWS_AT_A_TIME)])
        return {k: beside(as_statistic(hits[:, :k].any(1)).mean(), embeddings) for k in self.neighbours}


def _hits(embeddings: Tensor, labels: Tensor, first: int, most: int) -> Tensor:
    """Of some rows, whether each of the nearest others is of the row's class: bool, shape (rows, most)."""
    rows = slice(first, first + ROWS_AT_A_TIME)
    cosines = embeddings[rows] @ embeddings.T
    cosines.diagonal(first).fill_(float("-inf"))  # an image is no neighbour of itself
    return labels[cosines.topk(most).indices] == labels[rows, None]
