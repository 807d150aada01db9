"""``syncbn import``: a file of weights of any known layout becomes one of ours, with its model card."""

from dataclasses import replace
from pathlib import Path

from syncbn.models.weights.card import ModelCard, check_card
from syncbn.models.weights.heads import BACKGROUND
from syncbn.models.weights.loading import check_input, network_with_weights, require_head
from syncbn.models.weights.reading import Weights, read_weights
from syncbn.models.weights.writing import require_folder, write_weights
from syncbn.preprocessing import Preprocessing


def import_weights(
    file: Path,
    output: Path | None = None,
    classes: Path | None = None,
    image_size: int | None = None,
    resize: int | None = None,
    mean: list[float] | None = None,
    std: list[float] | None = None,
    exif_orientation: bool | None = None,
) -> None:
    """Make a file of weights of Cadene's bninception, TF-slim's inception_v2 or our own network into our own format.

    The result, a safetensors file, holds the tensors by our names and a model card: the network, the classes and what
    it is fed. `syncbn predict`, `syncbn export` and `syncbn fit --model.weights` need nothing else; they take the
    original as well, with the card that can be told from it.

    Args:
        file: PyTorch's .pth, .pt or .ckpt, .safetensors, .npz, or a TensorFlow checkpoint.
        output: File to write. Without it FILE.safetensors beside the original.
        classes: Text file with the names of the classes, one a line, in the order of the outputs.
        image_size: Side of the images that the network was trained on, in pixels, where the file does not say it.
        resize: Pixels of the shorter side before the centre is cut out; likewise.
        mean: Of each channel on the scale 0..255; likewise.
        std: Of each channel on the scale 0..255; likewise.
        exif_orientation: Whether `syncbn predict` turns images as their EXIF says; likewise. They are not without it.

    Raises:
        ValueError: The file cannot be read, or is of no known layout; tensors are missing; or the network cannot be fed
            what the card then says.
        OSError: A file cannot be read or written.
    """
    output = file.with_suffix(".safetensors") if output is None else output
    if output.exists() and file.exists() and output.samefile(file):  # a TensorFlow checkpoint's name is no file's
        raise ValueError(f"--output {output} is the file itself: name another")
    require_folder(output)
    weights = read_weights(file)
    require_head(weights)
    card = _complete(weights.card, image_size, resize, mean, std)
    if exif_orientation is not None:
        card = replace(card, exif_orientation=exif_orientation)
    if classes is not None:
        card = _name_classes(card, classes)
    network = network_with_weights(weights, card.num_classes or 1, {}, card.embedding_dimension).eval()
    check_card(card)
    check_input(card, network)
    write_weights(network, card, output, "safetensors")
    for line in describe(weights, card):
        print(line)
    print(output)


def _complete(
    card: ModelCard, image_size: int | None, resize: int | None, mean: list[float] | None, std: list[float] | None
) -> ModelCard:
    """The card with what the user adds to it."""
    if (mean is None) != (std is None):
        raise ValueError("--mean and --std belong together: give both or none")
    if mean is not None:
        order = card.preprocessing.colour_order
        numbers = Preprocessing.from_dict({"colour_order": order, "mean": mean, "std": std})
        card = replace(card, preprocessing=numbers)
    if image_size is not None:
        card = replace(card, image_size=image_size, resize=None)
    return card if resize is None else replace(card, resize=resize)


def _name_classes(card: ModelCard, path: Path) -> ModelCard:
    """The card with the names of a file; slim's background is named where the file has one name too few."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--classes {path} is not in UTF-8 ({error.reason} at byte {error.start}): save it so"
        ) from error
    names = [line.strip() for line in text.splitlines() if line.strip()]
    if card.layout == "slim" and card.num_classes == len(names) + 1:
        names.insert(0, BACKGROUND)
    if len(names) != card.num_classes:
        raise ValueError(f"--classes {path} names {len(names)} classes, the network has {card.num_classes}")
    return replace(card, classes=tuple(names))


def describe(weights: Weights, card: ModelCard) -> list[str]:
    """What was read, in lines."""
    fed = card.preprocessing
    numbers = "the data's own mean and std" if fed.mean is None else f"mean {list(fed.mean)}, std {list(fed.std or ())}"
    parameters = sum(
        tensor.numel()
        for name, tensor in weights.tensors.items()
        if "running" not in name and "num_batches" not in name
    )
    network = ", ".join(f"{name}={value!r}" for name, value in card.architecture.items())
    head = f"an embedding of {card.embedding_dimension} numbers"
    if card.embedding_dimension is None:
        head = f"{card.num_classes or 'no'} classes"
    lines = [
        f"layout {weights.layout.name}: {len(weights.tensors)} tensors, {parameters:,} parameters",
        f"network: {network or 'defaults'}, {head}",
        f"fed with {fed.colour_order} of {card.image_size or 'unknown'} pixels, {numbers} (on 0..255)",
    ]
    if card.layout == "slim" and card.num_classes:
        lines.append("class 0 is TF-slim's background where the network was trained on 1001 classes")
    return lines


COMMANDS = import_weights
