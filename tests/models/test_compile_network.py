"""torch.compile(fullgraph=True) of the whole Inception-BN in training: 33 all-reduces a direction, numbers of eager."""

import pytest
import torch
import torch.nn.functional as F

from graphs import counting_backend
from ranks import run_ranks
from syncbn.models import inception_bn

# Raised inside torch itself while it compiles.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec.*:FutureWarning"),
]


def network():
    torch.manual_seed(0)
    return inception_bn(10, width_multiplier=0.125, stem="small").double()


def results(net, forward, rank):
    """The loss, all gradients and buffers of one step on this rank's four images."""
    generator = torch.Generator().manual_seed(rank)
    images = torch.randn(4, 3, 32, 32, generator=generator, dtype=torch.float64)
    loss = F.cross_entropy(forward(images), torch.arange(4))
    loss.backward()
    return [loss.detach(), *(p.grad for p in net.parameters()), *(b.double() for b in net.buffers())]


def compiled_and_eager(rank):
    """How far the compiled network is off the eager one, by quantity; and the all-reduces of its graphs."""
    eager, net, counts = network(), network(), []
    compiled = torch.compile(net, fullgraph=True, backend=counting_backend(counts))
    found, expected = results(net, compiled, rank), results(eager, eager, rank)
    scale = max(float(e.abs().max()) for e in expected[1:-1])
    errors = [float((f - e).abs().max()) / scale for f, e in zip(found, expected, strict=True)]
    return errors, counts


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_whole_network_is_one_graph_with_33_messages_a_direction():
    for errors, counts in run_ranks(compiled_and_eager, 2, timeout=850, group_timeout=800):
        assert counts == [33, 33]
        assert max(errors) < 1e-9, errors
