"""Recall@k against torchmetrics' hit rate, the embedding, and its training loss."""

import pytest
import torch
import torch.nn.functional as F
from torchmetrics.retrieval import RetrievalHitRate

from syncbn.models import inception_bn
from syncbn.models.embedding import embed, put_proxy_head
from syncbn.training import ImageClassifier, RecallAtK
from syncbn.training.finetuning import retrieval


def random_set(images: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(images)
    return F.normalize(torch.randn(images, 5)), torch.randint(classes, (images,))


@pytest.mark.parametrize(("images", "classes"), [(40, 4), (40, 39), (9, 2)])
def test_it_is_the_hit_rate_of_the_neighbours(images, classes, monkeypatch):
    monkeypatch.setattr(retrieval, "ROWS_AT_A_TIME", 7)
    embeddings, labels = random_set(images, classes)
    metric = RecallAtK((1, 2, 5))
    for part in torch.arange(images).split(8):
        metric.update(embeddings[part], labels[part])
    pairs = [(i, j) for i in range(images) for j in range(images) if i != j]
    queries, others = (torch.tensor(column) for column in zip(*pairs, strict=True))
    cosines = (embeddings[queries] * embeddings[others]).sum(1)
    for k, recall in metric.compute().items():
        truth = RetrievalHitRate(top_k=k)(cosines, labels[queries] == labels[others], indexes=queries)
        assert float(recall) == pytest.approx(float(truth)), k


def test_of_one_image_and_of_none():
    metric = RecallAtK((1, 8))
    metric.update(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64))
    assert all(value.isnan() for value in metric.compute().values())
    metric.reset()
    metric.update(*random_set(1, 1))
    assert [float(value) for value in metric.compute().values()] == [0, 0]


def network():
    net = inception_bn(10, width_multiplier=0.125, stem="small")
    put_proxy_head(net, 3, 6, 0.05)
    return net.eval()


def test_embeddings_have_norm_one_and_logits_are_cosines_over_the_temperature(float64):
    net, images = network(), torch.randn(4, 3, 16, 16)
    features = net.forward_features(images)
    pooled = features.mean((2, 3)) + features.flatten(2).max(2).values
    linear = pooled @ net.classifier.embedding.weight.T + net.classifier.embedding.bias
    embeddings = embed(net, images)
    torch.testing.assert_close(embeddings, linear / linear.norm(dim=1, keepdim=True))
    proxies = net.classifier.proxies
    cosines = F.cosine_similarity(embeddings[:, None], proxies[None], dim=2)
    torch.testing.assert_close(net(images), cosines / 0.05)


@pytest.mark.parametrize(("dimension", "temperature"), [(0, 0.05), (4, 0.0)])
def test_arguments_out_of_range(dimension, temperature):
    with pytest.raises(ValueError, match="embedding_"):
        put_proxy_head(inception_bn(10, width_multiplier=0.125), 3, dimension, temperature)


def test_the_state_of_a_classifier_fits_but_for_the_head():
    plain = ImageClassifier(8, 5, 1, 80, width_multiplier=0.125, stem="small")
    embedder = ImageClassifier(8, 5, 1, 80, width_multiplier=0.125, stem="small", embedding_dimension=4)
    names, others = set(plain.network.state_dict()), set(embedder.network.state_dict())
    assert names - others == {"classifier.weight", "classifier.bias"}
    assert others - names == {"classifier.embedding.weight", "classifier.embedding.bias", "classifier.proxies"}


def test_an_embedding_predicts_no_classes():
    model = ImageClassifier(8, 5, 1, 80, width_multiplier=0.125, stem="small", embedding_dimension=4)
    with pytest.raises(ValueError, match="an embedding has no class probabilities"):
        model.predict_step(None, 0)
