"""Weights whose logits differ from image to image, and photos to look at, shared by the tests of inference."""

import os
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from syncbn.models import inception_bn
from syncbn.models.embedding import put_embedding_head
from syncbn.models.weights import ModelCard, write_weights
from syncbn.preprocessing import find_preprocessing

PHOTOS = Path(os.environ.get("SYNCBN_TEST_DATA", "../shared/data")) / "imagenet-originals"


def photos(count):
    """Paths of ImageNet photos, where there are any."""
    found = sorted(PHOTOS.glob("*.JPEG"))[:count]
    if len(found) < count:
        pytest.skip(f"{PHOTOS} holds no photos: set SYNCBN_TEST_DATA")
    return found


def make_network(seed=0, **arguments):
    """A narrow network that has seen noise, and whose classifier tells images apart."""
    torch.manual_seed(seed)
    network = inception_bn(10, width_multiplier=0.125, **arguments)
    for layer in network.modules():
        if hasattr(layer, "momentum"):
            layer.momentum = 1.0
    with torch.no_grad():
        network(2 * torch.randn(16, network.in_channels, 64, 64))
        network.classifier.weight.normal_(std=0.1)
    return network.eval()


def make_card(network, variant="paper", **changes):
    means, stds = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if network.in_channels == 3 else ((0.3,), (0.35,))
    card = ModelCard(
        layout="syncbn",
        architecture=network.arguments,
        num_classes=10,
        classes=tuple(f"name {label}" for label in range(10)),
        preprocessing=find_preprocessing(variant).resolved(means, stds),
        image_size=64,
        resize=72,
    )
    return replace(card, **changes)


def make_file(folder, variant="paper", name="model.safetensors", **arguments):
    """A file of weights; returns it and its network."""
    network = make_network(variant=variant, **arguments)
    write_weights(network, make_card(network, variant), folder / name, "safetensors")
    return folder / name, network


def make_embedding_file(folder):
    """A file of weights of an embedding of 6 numbers, in Cadene's variant; returns it and its network."""
    network = make_network(variant="cadene")
    put_embedding_head(network, 6)
    network.eval()
    card = make_card(network, "cadene", num_classes=None, classes=None, embedding_dimension=6)
    write_weights(network, card, folder / "embedding.safetensors", "safetensors")
    return folder / "embedding.safetensors", network


def by_hand(path, variant, size=64, resize=72):
    """What the network is fed of a photo, written out: shorter side, central square, normalised."""
    image = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    height, width = image.shape[:2]
    scale = resize / min(height, width)
    shape = (round(width * scale), round(height * scale))
    image = cv2.resize(image, shape, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    square = image[(image.shape[0] - resize) // 2 :, (image.shape[1] - resize) // 2 :][:resize, :resize]
    start = (resize - size) // 2
    pixels = square[start : start + size, start : start + size].astype(np.float64)
    if variant == "cadene":
        pixels = pixels[:, :, ::-1] - (104, 117, 128)
    elif variant == "slim":
        pixels = 2 * pixels / 255 - 1
    else:
        pixels = (pixels / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy()).float()
