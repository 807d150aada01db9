"""SyncBatchNorm with Hugging Face Accelerate.

    accelerate launch --num_processes 2 examples/accelerate_loop.py      # add --cpu where there is no GPU

On any number of processes it prints the same losses: together they normalise, and average, over one batch.
"""

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import syncbn

GLOBAL_BATCH, STEPS = 32, 5


def main() -> None:
    """Train a small network for some steps on made-up images."""
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(0)  # the same weights and images on all ranks
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 4),
    )
    syncbn.convert_sync_batchnorm(net)  # before prepare, which wraps the network
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    images = torch.randn(STEPS * GLOBAL_BATCH, 3, 16, 16)
    data = TensorDataset(images, torch.arange(len(images)) % 4)
    loader = DataLoader(data, GLOBAL_BATCH // accelerator.num_processes)
    net, optimizer, loader = accelerator.prepare(net, optimizer, loader)

    for step, (inputs, labels) in enumerate(loader):
        loss = F.cross_entropy(net(inputs), labels)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        mean = accelerator.reduce(loss.detach(), "mean")
        accelerator.print(f"step {step}: loss {float(mean):.5f}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
