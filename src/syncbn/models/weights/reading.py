"""From a file of any known layout to tensors by our names, with the card that says what network they are of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from syncbn.models.table import STEM_CONV1, STEM_CONV2, TABLE, scale_channels
from syncbn.models.variants import VARIANTS
from syncbn.models.weights.cadene import CADENE
from syncbn.models.weights.card import CARD_KEY, ModelCard, parse_card, read_card_beside
from syncbn.models.weights.files import FileContent, WeightsError, read_file
from syncbn.models.weights.layout import Layout
from syncbn.models.weights.own import OWN
from syncbn.models.weights.slim import SLIM
from syncbn.preprocessing import Preprocessing, find_preprocessing

LAYOUTS = (CADENE, SLIM, OWN)

ANCHOR = "stem.conv2_reduce.conv.weight"
"""A tensor that every network has, by which a layout is told."""

STORED_OPTIONS = (
    *("variant", "norm", "activation", "width_multiplier", "stem", "local_response_norm", "dropout"),
    *("per_activation_head", "in_channels"),
)
"""Arguments of `inception_bn` that a Lightning checkpoint's hyperparameters hold by the same name; the others, of which
momentum means something else there, are in ``variant_options``."""

WIDTHS = [step / 32 for step in range(1, 129)]
"""Width multipliers that are looked for in the shapes of weights without a card."""


@dataclass(frozen=True)
class Weights:
    """The content of a file.

    Attributes:
        path: Of the file.
        layout: Its layout.
        tensors: By our names, the axes in our order.
        unmatched: Keys of the file that are of no layer of Inception-BN.
        card: The network that they are of.
        keys: The file's keys of the tensors, by our names.
        new_head: Whether a network is to have a new classifier although the file has one.
    """

    path: Path
    layout: Layout
    tensors: dict[str, Tensor]
    unmatched: tuple[str, ...]
    card: ModelCard
    keys: Mapping[str, str]
    new_head: bool = False

    def key(self, name: str) -> str:
        """What the file calls a tensor of our name, or would if it had it."""
        if name in self.keys:
            return self.keys[name]
        theirs = {entry.ours: entry.theirs for entry in reversed(self.layout.entries)}
        prefix = self.keys[ANCHOR].removesuffix(":0").removesuffix(theirs[ANCHOR])
        return prefix + theirs.get(name, name)


def read_weights(path: str | Path) -> Weights:
    """Read a file of weights; its kind and its layout are told by its content.

    Args:
        path: Of a file that `read_file` reads.

    Raises:
        ValueError: It cannot be read, or is of no known layout; the message names it.
    """
    path = Path(path).expanduser()
    content = read_file(path)
    layout, tensors, keys = _match(path, content)
    _check_parts_of_heads(path, tensors, keys)
    card = _card_of(path, content) or _inferred_card(layout, tensors, content.metadata)
    _check_head(path, card, tensors)
    if fault := first_not_finite((keys.get(name, name), tensor) for name, tensor in tensors.items()):
        raise WeightsError(path, f"{fault}: take an earlier checkpoint")
    unmatched = {*content.tensors, *content.others} - {*keys.values()}
    return Weights(path, layout, tensors, tuple(sorted(unmatched)), card, keys)


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The first of some named tensors with a value that is NaN or infinite, in words; "" where there is none."""
    for name, tensor in tensors:
        finite = tensor.isfinite()
        if not bool(finite.all()):
            return f"{int((~finite).sum()):,} of {tensor.numel():,} values of {name} are not finite"
    return ""


def _check_parts_of_heads(path: Path, tensors: Mapping[str, Tensor], keys: Mapping[str, str]) -> None:
    """Refuse what can be no linear layer, of a classifier or an embedding."""
    for layer in ("classifier", "classifier.embedding"):
        weight, bias = f"{layer}.weight", f"{layer}.bias"
        if bias in tensors and weight not in tensors:
            raise WeightsError(path, f"{keys[bias]} is there without a weight: give the whole {layer}, or none of it")
        if weight in tensors and tensors[weight].dim() != 2:
            shape = tuple(tensors[weight].shape)
            raise WeightsError(path, f"{keys[weight]} has the shape {shape}, not (outputs, inputs)")


def _check_head(path: Path, card: ModelCard, tensors: Mapping[str, Tensor]) -> None:
    """Refuse a card that is of another classifier or embedding than the file."""
    head, embedding = tensors.get("classifier.weight"), tensors.get("classifier.embedding.weight")
    if embedding is not None and card.embedding_dimension not in (None, len(embedding)):
        raise WeightsError(path, f"its card is of {card.embedding_dimension} numbers, its embedding {len(embedding)}")
    if head is not None and card.embedding_dimension is None and len(head) != card.num_classes:
        raise WeightsError(path, f"its card is of {card.num_classes} classes, its classifier of {len(head)}")


def _match(path: Path, content: FileContent) -> tuple[Layout, dict[str, Tensor], dict[str, str]]:
    """The layout of a file, and its tensors and its keys by our names."""
    for layout in LAYOUTS:
        found = layout.by_foreign_name(content.tensors)
        if any(entry.ours == ANCHOR for entry in found.values()):
            break
    else:
        keys = ", ".join(list(content.tensors)[:3]) or "none"
        raise WeightsError(
            path,
            f"its {len(content.tensors)} tensors are of no known layout of Inception-BN ({keys} ...):"
            " Cadene's bninception, TF-slim's inception_v2 and syncbn's own are read",
        )
    tensors: dict[str, Tensor] = {}
    key_of: dict[str, str] = {}
    for key, entry in found.items():
        if entry.ours in key_of:
            raise WeightsError(
                path, f"{key_of[entry.ours]} and {key} are both {entry.ours}: give a file with one network"
            )
        key_of[entry.ours] = key
        try:
            tensors[entry.ours] = entry.axes.to_ours(content.tensors[key])
        except (RuntimeError, IndexError) as error:
            raise WeightsError(path, f"{key} has the shape {tuple(content.tensors[key].shape)}, not that") from error
    return layout, tensors, key_of


# ---- the card, or what can be said without one ---------------------------------------------------


def _card_of(path: Path, content: FileContent) -> ModelCard | None:
    """The card in the file, or beside it."""
    text = content.metadata.get(CARD_KEY)
    return read_card_beside(path) if text is None else parse_card(text, f"{CARD_KEY} of {path}")


def _inferred_card(layout: Layout, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> ModelCard:
    """What the layout, a checkpoint's hyperparameters and the shapes of the tensors say."""
    architecture = infer_architecture(layout.variant, tensors)
    options = metadata.get("hyper_parameters")
    if layout is OWN and isinstance(options, Mapping):
        architecture = {name: options[name] for name in STORED_OPTIONS if options.get(name) is not None}
        architecture |= options.get("variant_options") or {}
    head, embedding = tensors.get("classifier.weight"), tensors.get("classifier.embedding.weight")
    return ModelCard(
        layout=layout.name,
        architecture=architecture,
        num_classes=None if head is None or embedding is not None else len(head),
        classes=None,
        preprocessing=_preprocessing_of(architecture.get("variant", "paper")),
        image_size=layout.image_size,
        resize=layout.resize,
        embedding_dimension=None if embedding is None else len(embedding),
    )


def _preprocessing_of(variant: object) -> Preprocessing:
    return find_preprocessing(variant if isinstance(variant, str) and variant in VARIANTS else "paper")


def infer_architecture(variant: str | None, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of `inception_bn` that the names and the shapes of tensors betray, where they are not the default.

    Args:
        variant: Whose attributes need no mention; None takes "paper".
        tensors: By our names.

    Returns:
        The arguments; padding, eps and activation, which leave no trace, are the variant's.
    """
    dense, pointwise = (tensors.get(f"stem.conv1.conv.{name}weight") for name in ("", "pointwise."))
    first = dense if pointwise is None else tensors.get("stem.conv1.conv.depthwise.weight")
    found: dict[str, Any] = {"variant": variant or "paper"}
    if not any(".bn." in name for name in tensors):
        found["norm"] = "none"
    else:
        attributes = {
            "stem_norm": "stem.conv1.bn.bias" in tensors,
            "conv_bias": "stem.conv2.conv.bias" in tensors,
            "gamma": "stem.conv2.bn.weight" in tensors,
        }
        spec = asdict(VARIANTS[found["variant"]])
        found |= {name: value for name, value in attributes.items() if value != spec[name]}
    if (pointwise is not None) != VARIANTS[found["variant"]].separable_stem:
        found["separable_stem"] = pointwise is not None
    if first is not None and first.dim() == 4:
        if first.shape[2] == 3:
            found["stem"] = "small"
        channels = first.shape[1] if pointwise is None else first.shape[0] // 8
        if channels != 3:
            found["in_channels"] = channels
    return found | _width_and_projection(found["variant"], tensors)


def _width_and_projection(variant: str, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The width multiplier and the projection of 4c and 4d, where they are not the default, by most of the shapes.

    A tensor of a wrong shape is then the one that is refused, not all the others.
    """

    def channels(unit: str) -> int:
        weight = tensors.get(f"{unit}.conv.weight")
        return 0 if weight is None or weight.dim() == 0 else weight.shape[0]

    actual = [channels("stem.conv2_reduce"), channels("stem.conv2")]
    expected = [STEM_CONV1, STEM_CONV2]
    for row in TABLE:
        actual.append(channels(f"inception_{row.name}.branch_3x3.spatial"))
        expected.append(row.conv_3x3)
    actual += [channels(f"inception_{name}.branch_pool.projection") for name in ("4c", "4d")]
    usual = VARIANTS[variant].projection_4cd

    def agreeing(choice: tuple[float, int]) -> int:
        width, projection = choice
        wanted = [scale_channels(count, width) for count in (*expected, projection, projection)]
        return sum(map(int.__eq__, wanted, actual))

    choices = [(width, projection) for width in (1.0, *WIDTHS) for projection in (usual, 128, 96)]
    width, projection = max(choices, key=agreeing)  # the first of several
    found: dict[str, Any] = {} if width == 1 else {"width_multiplier": width}
    return found if projection == usual else found | {"projection_4cd": projection}
