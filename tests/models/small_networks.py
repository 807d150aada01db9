"""Small networks and images that the tests of the models share."""

import torch

SMALL = {"num_classes": 10, "width_multiplier": 0.125}


def images(n=2, size=32, channels=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, channels, size, size, generator=generator, dtype=dtype)


def trainable(network):
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def shake(network):
    """Move gamma, beta and the biases away from 1 and 0, so that a test sees them."""
    with torch.no_grad():
        for p in network.parameters():
            if p.dim() == 1 and p.requires_grad:
                p.add_(0.2 * torch.randn_like(p))
    return network
