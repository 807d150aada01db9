"""The layout of TF-slim's inception_v2, also as TensorFlow's Object Detection API has it (more prefix, more BN)."""

from syncbn.models.weights.layout import CONVOLUTION, DEPTHWISE, LINEAR, STEM_UNITS, Entry, Layout, unit_names

STEM = dict(zip(STEM_UNITS, ("Conv2d_1a_7x7", "Conv2d_2b_1x1", "Conv2d_2c_3x3"), strict=True))
"""Our units of the stem, and their scopes there."""

MODULES = {
    **{"inception_3a": "Mixed_3b", "inception_3b": "Mixed_3c", "inception_3c": "Mixed_4a"},
    **{"inception_4a": "Mixed_4b", "inception_4b": "Mixed_4c", "inception_4c": "Mixed_4d", "inception_4d": "Mixed_4e"},
    **{"inception_4e": "Mixed_5a", "inception_5a": "Mixed_5b", "inception_5b": "Mixed_5c"},
}
"""Our modules, and their scopes there: the letters are one further, since the pools count."""

BRANCHES = {
    "branch_1x1": "Branch_0/Conv2d_0a_1x1",
    "branch_3x3.reduce": "Branch_1/Conv2d_0a_1x1",
    "branch_3x3.spatial": "Branch_1/Conv2d_0b_3x3",
    "branch_double_3x3.reduce": "Branch_2/Conv2d_0a_1x1",
    "branch_double_3x3.spatial_1": "Branch_2/Conv2d_0b_3x3",
    "branch_double_3x3.spatial_2": "Branch_2/Conv2d_0c_3x3",
    "branch_pool.projection": "Branch_3/Conv2d_0b_1x1",
}
"""Our units of a module of stride 1, and their scopes in it."""

STRIDED_MODULES = ("inception_3c", "inception_4e")

STRIDED_BRANCHES = {
    "branch_3x3.reduce": "Branch_0/Conv2d_0a_1x1",
    "branch_3x3.spatial": "Branch_0/Conv2d_1a_3x3",
    "branch_double_3x3.reduce": "Branch_1/Conv2d_0a_1x1",
    "branch_double_3x3.spatial_1": "Branch_1/Conv2d_0b_3x3",
    "branch_double_3x3.spatial_2": "Branch_1/Conv2d_1a_3x3",
}
"""The same of a module of stride 2, which has no 1x1 branch."""

NORM = {"weight": "gamma", "bias": "beta", "running_mean": "moving_mean", "running_var": "moving_variance"}
"""What our BatchNorm's tensors are called there."""

HEAD = "Logits/Conv2d_1c_1x1"


def scope_of(unit: str) -> str:
    """The scope there of a unit of ours."""
    if unit in STEM:
        return STEM[unit]
    module, _, branch = unit.partition(".")
    return f"{MODULES[module]}/{(STRIDED_BRANCHES if module in STRIDED_MODULES else BRANCHES)[branch]}"


def entries() -> list[Entry]:
    """The table of names."""
    table = []
    for unit in unit_names():
        scope = scope_of(unit)
        if unit == STEM_UNITS[0]:
            table += [
                Entry(f"{unit}.conv.depthwise.weight", f"{scope}/depthwise_weights", DEPTHWISE),
                Entry(f"{unit}.conv.pointwise.weight", f"{scope}/pointwise_weights", CONVOLUTION),
                Entry(f"{unit}.conv.pointwise.bias", f"{scope}/biases"),
            ]
        else:
            table.append(Entry(f"{unit}.conv.weight", f"{scope}/weights", CONVOLUTION))
        table += [Entry(f"{unit}.bn.{ours}", f"{scope}/BatchNorm/{theirs}") for ours, theirs in NORM.items()]
    table += [Entry("classifier.weight", f"{HEAD}/weights", LINEAR), Entry("classifier.bias", f"{HEAD}/biases")]
    return table


SLIM = Layout(
    name="slim",
    variant="slim",
    entries=tuple(entries()),
    separator="/",
    required={"separable_stem": True, "conv_bias": False, "padding": "same", "eps": 1e-3},
    image_size=224,  # and 256 before: slim's evaluation takes the central 0.875 of the image
    resize=256,
)
