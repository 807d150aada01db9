"""Networks: Inception-BN, plain or synchronised."""

from syncbn.models.inception_bn import InceptionBN, inception_bn

__all__ = ["InceptionBN", "inception_bn"]
