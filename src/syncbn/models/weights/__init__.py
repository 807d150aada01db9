"""Files of weights: Cadene's, TF-slim's and our own, read and written; see `read_weights` and `write_weights`.

Each public layout is a table of names in a file of its own (`cadene`, `slim`, `own`). `card` is the model card: the
network and the input that the weights belong to.
"""

from syncbn.models.weights.card import CARD_KEY, ModelCard, card_path, parse_card, read_card_beside
from syncbn.models.weights.files import WeightsError
from syncbn.models.weights.heads import HeadPolicy, choose_head
from syncbn.models.weights.loading import build_network, check_input, load_into, load_network, network_with_weights
from syncbn.models.weights.reading import Weights, read_weights
from syncbn.models.weights.writing import require_folder, write_weights

__all__ = [
    "CARD_KEY",
    "HeadPolicy",
    "ModelCard",
    "Weights",
    "WeightsError",
    "build_network",
    "card_path",
    "check_input",
    "choose_head",
    "load_into",
    "load_network",
    "network_with_weights",
    "parse_card",
    "read_card_beside",
    "read_weights",
    "require_folder",
    "write_weights",
]
