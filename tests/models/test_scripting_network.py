"""Whole networks under torch.jit.script: unit after unit, where eager runs several in one message."""

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from syncbn import fold_batch_norm, revert_sync_batchnorm
from syncbn.models import inception_bn
from syncbn.models.embedding import put_proxy_head

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.*:DeprecationWarning")  # torch's own

OPTIONS = [
    {"variant": "paper"},
    {"variant": "cadene"},
    {"variant": "slim", "stem": "small"},
    {"activation": "sigmoid", "local_response_norm": True},
    {"norm": "none"},
    {"per_activation_head": 40},
]
WAYS = {"synchronised": lambda network: network, "reverted": revert_sync_batchnorm, "folded": fold_batch_norm}


def network(**options):
    torch.manual_seed(0)
    found = inception_bn(5, width_multiplier=0.125, dropout=0.5, **options)
    for m in found.modules():
        if isinstance(m, _BatchNorm):
            m.running_mean.uniform_(-0.5, 0.5), m.running_var.uniform_(0.5, 2)
            nn.init.uniform_(m.bias, -0.5, 0.5)
    return found.double().eval()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_scripted_and_frozen(options, way):
    if way == "reverted" and "per_activation_head" in options:
        pytest.skip("has no plain counterpart")
    eager = WAYS[way](network(**options))
    scripted = torch.jit.freeze(torch.jit.script(eager))
    for size in [(2, 3, 40, 40)] if "per_activation_head" in options else [(2, 3, 40, 40), (3, 3, 33, 47)]:
        x = torch.randn(size, dtype=torch.float64)
        torch.testing.assert_close(scripted(x), eager(x), rtol=1e-11, atol=1e-12)


def test_with_another_head():
    eager = network()
    put_proxy_head(eager, 5, 8, 0.1)
    eager.double()
    x = torch.randn(2, 3, 40, 40, dtype=torch.float64)
    torch.testing.assert_close(torch.jit.script(eager)(x), eager(x), rtol=1e-11, atol=1e-12)


def test_in_training_mode_it_is_refused():
    with pytest.raises(ValueError, match=r"'stem.conv1.bn' SyncBatchNorm.*\.eval\(\)"):
        torch.jit.script(network().train())
