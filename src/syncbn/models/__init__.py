"""Networks: Inception-BN, plain or synchronised.

Read downward: the paper's table (`table`), its public variants (`variants`), the blocks (`blocks`), the network
(`network`), and the factory that users call (`inception_bn`). `weights` reads and writes files of weights.
"""

from syncbn.models.inception_bn import inception_bn
from syncbn.models.network import InceptionBN

__all__ = ["InceptionBN", "inception_bn"]
