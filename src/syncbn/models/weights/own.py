"""The layout of our own networks, under any prefix: that of Lightning's checkpoints is ``network.``."""

from syncbn.models.weights.layout import NORM_TENSORS, STEM_UNITS, Entry, Layout, unit_names


def entries() -> list[Entry]:
    """The table of names: each tensor is called there as it is here."""
    names = []
    for unit in unit_names():
        names += [f"{unit}.conv.weight", f"{unit}.conv.bias"]
        if unit == STEM_UNITS[0]:
            names += [f"{unit}.conv.{part}" for part in ("depthwise.weight", "pointwise.weight", "pointwise.bias")]
        names += [f"{unit}.bn.{part}" for part in NORM_TENSORS]
    names += ["classifier.weight", "classifier.bias"]
    names += ["classifier.embedding.weight", "classifier.embedding.bias", "classifier.proxies"]
    return [Entry(name, name) for name in names]


OWN = Layout(name="syncbn", variant=None, entries=tuple(entries()), separator=".", required={})
