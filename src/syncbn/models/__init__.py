"""Networks: Inception-BN, plain or synchronised."""

from syncbn.models.inception_bn import inception_bn
from syncbn.models.network import InceptionBN

__all__ = ["InceptionBN", "inception_bn"]
