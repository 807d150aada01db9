"""SyncBatchNorm in a training loop of your own, under DistributedDataParallel.

    torchrun --nproc-per-node 2 examples/plain_ddp.py

On any number of processes it prints the same losses: together they normalise, and average, over one batch.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn

GLOBAL_BATCH, STEPS = 32, 5


def main() -> None:
    """Train a small network for some steps on made-up images."""
    on_gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if on_gpu else torch.device("cpu")

    torch.manual_seed(0)  # the same weights on all ranks
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    ).to(device)
    syncbn.convert_sync_batchnorm(net)
    # Running statistics are equal on all ranks already: forward_sync_buffers=False (before torch 2.13:
    # broadcast_buffers=False) saves a broadcast a step.
    ddp = DistributedDataParallel(net)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)

    for step in range(STEPS):
        images, labels = torch.randn(GLOBAL_BATCH, 3, 16, 16), torch.arange(GLOBAL_BATCH) % 4  # of all ranks
        loss = F.cross_entropy(ddp(images[rank::ranks].to(device)), labels[rank::ranks].to(device))
        mean = loss.detach() / ranks
        dist.all_reduce(mean)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if rank == 0:
            print(f"step {step}: loss {float(mean):.5f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
