"""Draw the picture of the README: training losses on 1, 2 and 4 ranks, with syncbn and with plain BatchNorm.

::

    python scripts/draw_same_losses.py

It trains a small convolutional network on the Fashion-MNIST images of the package, on CPU processes with one thread
each, and writes docs/figures/same_losses.png and same_losses.csv. The network, the initial weights and the images of
each global batch are the same in every run. The rows of float32 are for docs/exact.md.
"""

import csv
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import syncbn
from syncbn.data import fashion_mnist
from syncbn.experiments.rank_processes import run_on_ranks

FIGURES = Path(__file__).parents[1] / "docs" / "figures"
RANKS = (1, 2, 4)
GLOBAL_BATCH, STEPS = 8, 60
RUNS = (("syncbn", torch.float64), ("plain", torch.float64), ("syncbn", torch.float32))
NORMS = {"syncbn": "syncbn.SyncBatchNorm", "plain": "nn.BatchNorm2d"}
STYLES = {1: ("0.7", "-", 5.0), 2: ("C0", "-", 1.8), 4: ("C3", "--", 1.4)}  # of P: color, line style, line width


def make_network() -> nn.Sequential:
    """A network with two BatchNorm layers for images of shape (N, 1, 28, 28)."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 3, stride=2, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
        *(nn.Conv2d(16, 32, 3, stride=2, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10)),
    )


def make_batches(steps: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Images, shape (steps, GLOBAL_BATCH, 1, 28, 28), and labels, shape (steps, GLOBAL_BATCH), of all ranks."""
    data = fashion_mnist("train")
    chosen = torch.randperm(len(data.labels), generator=torch.Generator().manual_seed(0))[: steps * GLOBAL_BATCH]
    images = (torch.from_numpy(data.images)[chosen].to(dtype) / 255 - data.mean[0]) / data.std[0]
    labels = torch.from_numpy(data.labels)[chosen].long()
    return images.reshape(steps, GLOBAL_BATCH, 1, 28, 28), labels.reshape(steps, GLOBAL_BATCH)


def train(rank: int, progress: object, losses: Tensor) -> None:
    """Train one rank's part of each run; rank 0 writes the losses of global batches, shape (runs, steps)."""
    for (norm, dtype), row in zip(RUNS, losses, strict=True):
        network = make_network().to(dtype)
        if norm == "syncbn":
            syncbn.convert_sync_batchnorm(network)
        ddp = nn.parallel.DistributedDataParallel(network)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.05, momentum=0.9)
        for step, (images, labels) in enumerate(zip(*make_batches(len(row), dtype), strict=True)):
            ranks = dist.get_world_size()
            loss = F.cross_entropy(ddp(images[rank::ranks]), labels[rank::ranks])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            mean = loss.detach() / ranks
            dist.all_reduce(mean)
            if rank == 0:
                row[step] = mean


def run(ranks: int, steps: int = STEPS) -> Tensor:
    """The loss of each step of each run, float64, shape (runs, steps)."""
    losses = torch.zeros(len(RUNS), steps, dtype=torch.float64).share_memory_()
    run_on_ranks(train, ranks, losses, progress=lambda _: None)
    return losses


def draw_losses(axes: Axes, norm: str, losses: dict[int, Tensor]) -> None:
    """The curves of one kind of BatchNorm; ``losses`` by the number of ranks."""
    for ranks, curve in losses.items():
        color, style, width = STYLES[ranks]
        axes.plot(range(1, len(curve) + 1), curve.numpy(), style, color=color, linewidth=width, label=f"P = {ranks}")
    largest = max(float((curve - losses[1]).abs().max()) for curve in losses.values())
    axes.set_title(f"{NORMS[norm]}\nlargest difference from P = 1: {largest:.2g}", fontsize=11)
    axes.set_xlabel("step")
    axes.legend(loc="upper right", frameon=False)


def main() -> None:
    """Train, print the differences from one rank, and write the picture and its numbers."""
    by_ranks = {ranks: run(ranks) for ranks in RANKS}
    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for number, (axes, (norm, _)) in enumerate(zip(panels, RUNS, strict=False)):
        draw_losses(axes, norm, {ranks: losses[number] for ranks, losses in by_ranks.items()})
    panels[0].set_ylabel("training loss of the global batch")
    figure.savefig(FIGURES / "same_losses.png", dpi=110)
    with (FIGURES / "same_losses.csv").open("w", newline="") as file:
        rows = csv.writer(file, lineterminator="\n")
        rows.writerow(["norm", "dtype", "ranks", "step", "loss"])
        for number, (norm, dtype) in enumerate(RUNS):
            name = str(dtype).removeprefix("torch.")
            for ranks, losses in by_ranks.items():
                numbered = enumerate(losses[number].tolist(), start=1)
                rows.writerows([norm, name, ranks, step, repr(loss)] for step, loss in numbered)
                apart = (losses[number] - by_ranks[1][number]).abs()
                print(norm, name, f"P = {ranks}: step 1: {float(apart[0]):.1e}, all: {float(apart.max()):.1e}")


if __name__ == "__main__":
    main()
