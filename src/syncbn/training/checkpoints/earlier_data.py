"""How data are read by what a run, a config or a checkpoint says that was written before there was an option for it.

What was trained goes on, and is tested, on the pixels it was trained on: an option that is left open follows them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from syncbn.data.datasets.formats import EMBEDDED
from syncbn.data.datasets.idx import find_idx_folder
from syncbn.data.datasets.parquet import find_parquet_files
from syncbn.data.datasets.shard_files import INDEX_NAME
from syncbn.models.weights import CARD_KEY
from syncbn.run_folders import CONFIG
from syncbn.training.checkpoints.files import checkpoints_of, read_without_tensors

OF_EVERY_RUN = frozenset(
    {"augmentation", "decoder", "drop_last", "evaluation_crops", "image_size", "num_workers", "on_read_error"}
    | {"resize", "root", "shuffle_window", "validation_images"}
)
"""Options of the data that the config in a run folder always has; one written by hand names a few."""

MEANT = {"exif_orientation": False, "suffixes": [".bmp", ".jpeg", ".jpg", ".png", ".webp"]}
"""What was done before there were these options, which the config of such a run lacks."""

NEVER = {"test_images": 0}
"""What no run did before there were these options: what they are now is what was said."""

OPEN = {"exif_orientation": None, "suffixes": None, "validate_on_test": False}
"""The options as they are where nobody has said anything."""


def options_of_run(data: Any, root: str) -> dict[str, Any]:
    """Options that the config of a run decides, by what it says or by what was done when there were none.

    Args:
        data: The part ``data`` of a config.
        root: Of the data that are read.

    Returns:
        The options of `OPEN` and `NEVER` that are decided; none of a config that was written by hand.
    """
    if not isinstance(data, Mapping) or not set(data) >= OF_EVERY_RUN:
        return {}
    meant = MEANT | NEVER | {"validate_on_test": _validated_on_test(root)}
    return {name: data.get(name, value) for name, value in meant.items()}


def _validated_on_test(root: str) -> bool:
    """Whether the test images were taken for validation where none were held out."""
    folder = Path(root).expanduser()
    if root == EMBEDDED or not folder.is_dir():
        return root == EMBEDDED
    if (folder / INDEX_NAME).is_file():
        return False
    if find_idx_folder(folder):
        return True
    if find_parquet_files(folder, "train"):
        return bool(find_parquet_files(folder, "test")) and not find_parquet_files(folder, "val")
    return (folder / "test").is_dir() and not (folder / "val").is_dir()


def settle_data(config: Any) -> None:
    """Decide what is left open of how data are read, by the run that is gone on with or whose checkpoint is used.

    Args:
        config: Of a subcommand; its part ``data`` is changed.

    Raises:
        ValueError: Two checkpoints were trained on different pixels.
    """
    options = config["data"]
    configs = [Path(str(file)) for file in config.get("config") or ()]
    configs += [Path(config["resume"], CONFIG)] if config.get("resume") else []
    decided: dict[str, Any] = {}
    for path in configs:
        decided |= options_of_run(_read(path).get("data"), options["root"])
    of_checkpoints = {path: meant for path in checkpoints_of(config) if (meant := _options_of_checkpoint(path))}
    turned = {path: meant["exif_orientation"] for path, meant in of_checkpoints.items()}
    if options["exif_orientation"] is None and len(set(turned.values())) > 1:
        first, second = sorted(turned, key=lambda path: turned[path])[:: len(turned) - 1]
        raise ValueError(
            f"the images of {second} were turned as their EXIF says, those of {first} were not: say what is to be done"
            " by data.exif_orientation"
        )
    for meant in of_checkpoints.values():
        decided |= meant
    for name, value in OPEN.items():
        if options[name] == value and name in decided:
            options[name] = decided[name]


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, ValueError, yaml.YAMLError):
        return {}  # what is wrong with it is said where it is parsed
    return content if isinstance(content, Mapping) else {}


def _options_of_checkpoint(path: str) -> dict[str, Any]:
    """Options that a checkpoint decides; none of what is no checkpoint, which is reported elsewhere."""
    try:
        checkpoint = read_without_tensors(Path(path).expanduser())
        card = json.loads(checkpoint[CARD_KEY]) if CARD_KEY in checkpoint else {}
        return {"exif_orientation": card["exif_orientation"]} if "exif_orientation" in card else dict(MEANT)
    except Exception:  # whatever unpickling junk may raise
        return {}
