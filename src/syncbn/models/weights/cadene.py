"""The layout of Cadene's bninception, that TSN, TSM and Proxy-Anchor use too (Caffe's, translated)."""

from syncbn.models.weights.layout import NORM_TENSORS, STEM_UNITS, Entry, Layout, unit_names

STEM = dict(zip(STEM_UNITS, ("conv1_7x7_s2", "conv2_3x3_reduce", "conv2_3x3"), strict=True))
"""Our units of the stem, and what they are called there."""

BRANCHES = {
    "branch_1x1": "1x1",
    "branch_3x3.reduce": "3x3_reduce",
    "branch_3x3.spatial": "3x3",
    "branch_double_3x3.reduce": "double_3x3_reduce",
    "branch_double_3x3.spatial_1": "double_3x3_1",
    "branch_double_3x3.spatial_2": "double_3x3_2",
    "branch_pool.projection": "pool_proj",
}
"""Our units of a module, and how their names end there: inception_3a.branch_1x1 is inception_3a_1x1."""

EMBEDDING = "embedding"
"""What Proxy-Anchor calls the linear map after average and maximum, beside a classifier that it leaves unused."""

HEADS = ("last_linear", "fc", "new_fc")
"""What the classifier is called: by Cadene, by TSM, and by TSN after its own is replaced."""


def foreign_unit(unit: str) -> str:
    """The name there of a unit of ours."""
    module, _, branch = unit.partition(".")
    return STEM[unit] if unit in STEM else f"{module}_{BRANCHES[branch]}"


def entries() -> list[Entry]:
    """The table of names."""
    table = []
    for unit in unit_names():
        name = foreign_unit(unit)
        table += [Entry(f"{unit}.conv.{part}", f"{name}.{part}") for part in ("weight", "bias")]
        table += [Entry(f"{unit}.bn.{part}", f"{name}_bn.{part}") for part in NORM_TENSORS]
    table += [Entry(f"classifier.{part}", f"{head}.{part}") for head in HEADS for part in ("weight", "bias")]
    table += [Entry(f"classifier.embedding.{part}", f"{EMBEDDING}.{part}") for part in ("weight", "bias")]
    return table


CADENE = Layout(
    name="cadene",
    variant="cadene",
    entries=tuple(entries()),
    separator=".",
    required={"separable_stem": False, "stem_norm": True, "padding": "symmetric", "eps": 1e-5},
    image_size=224,  # and 256 before: Cadene's evaluation takes the central 0.875 of the image
    resize=256,
)
