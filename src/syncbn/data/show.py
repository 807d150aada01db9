"""``syncbn data show``: a picture of what the network sees, in training and in evaluation."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.patches import Rectangle

from syncbn.data.datasets.base import ImageDataset
from syncbn.data.datasets.formats import EMBEDDED, open_training_set
from syncbn.data.loading.batches import BatchedImages
from syncbn.data.loading.samplers import SampleKey
from syncbn.data.transforms.augmentation import Augmentation
from syncbn.data.transforms.cropping import RandomCrop, fit_square
from syncbn.data.transforms.evaluation_crops import EvaluationCrops, View
from syncbn.data.transforms.photometric import PhotometricDistortion
from syncbn.pictures import drawable_names, plain_text

WIDTH, DOTS_PER_INCH = 13.0, 100
"""Of the picture; the width in inches."""

GAP = 0.05
"""Between the images of a mosaic, as a share of their side."""

PLACES = {
    "top left": "tab:orange",
    "top right": "tab:green",
    "bottom left": "tab:blue",
    "bottom right": "tab:red",
    "centre": "tab:purple",
    "whole": "black",
}
"""The six crops of a square, in the order of `EvaluationCrops`, with the colours of their boxes."""

SQUARES = {"wide": ("left", "centre", "right"), "tall": ("top", "centre", "bottom")}


def show(
    data: str = EMBEDDED,
    output: str = "show.png",
    image_size: int = 224,
    augmentation: Augmentation = Augmentation(crop=RandomCrop(), photometric=PhotometricDistortion()),  # noqa: B008
    images: int = 8,
    epochs: int = 5,
    seed: int = 0,
    exif_orientation: bool | None = None,
) -> None:
    """Write a contact sheet: images as several epochs see them, and the 144 crops of one of them with boxes.

    Args:
        data: 'fashion-mnist', or the path of a data set, as data.root of the training takes them.
        output: The PNG file to write.
        image_size: Side of the square that the network sees, in pixels.
        augmentation: Random changes to the training images, as data.augmentation of the training.
        images: How many training images to show, evenly spaced over the set. The first is cut into the 144 crops.
        epochs: How many epochs of each to show.
        seed: Decides the random changes, as seed_everything of the training.
        exif_orientation: Whether photos are turned as their EXIF says, as data.exif_orientation of the training.

    Raises:
        ValueError: The data are missing or broken, or a number is out of range.
    """
    for name, value in (("image_size", image_size), ("images", images), ("epochs", epochs)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if Path(output).suffix.lower() != ".png":
        raise ValueError(f"output={output!r} must end in .png")
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    dataset = open_training_set(data, exif_orientation)
    shown = (np.arange(min(images, len(dataset))) * len(dataset) // min(images, len(dataset))).tolist()
    training = BatchedImages(dataset, image_size, augmentation, seed)

    side = WIDTH / (len(shown) + 1)
    heights = [side * (epochs + 1) + 1.0, 18.5]
    names = dict(zip(shown, drawn_names(dataset, shown), strict=True))
    with plain_text(*names.values()):
        figure = Figure(figsize=(WIDTH, sum(heights)), dpi=DOTS_PER_INCH, layout="constrained")
        above, below = cast(Sequence[SubFigure], figure.subfigures(2, 1, height_ratios=heights))
        draw_epochs(above, training, names, epochs)
        draw_crops(below, dataset, shown[0], image_size, names[shown[0]])
        figure.savefig(output)
    print(output)


def drawn_names(dataset: ImageDataset, shown: Sequence[int]) -> list[str]:
    """Names of the classes of images, each as a picture can show it."""
    names = drawable_names(dataset.classes)
    return [shortened(names[dataset.label(index)]) for index in shown]


def draw_epochs(figure: SubFigure, training: BatchedImages, shown: Mapping[int, str], epochs: int) -> None:
    """Images side by side, under the names of their classes: as they are, and below as each epoch sees them."""
    dataset, size = training.dataset, training.image_size
    rows = [[fit_square(dataset.image(index), size) for index in shown]]
    rows += [[training.prepared_image(SampleKey(epoch, index))[0] for index in shown] for epoch in range(epochs)]
    figure.suptitle(f"Training: the same images in every epoch, {size} x {size} pixels")
    axes = figure.subplots()
    draw_mosaic(axes, rows)
    label_mosaic(axes, ["as it is", *(f"epoch {epoch}" for epoch in range(epochs))], [*shown.values()])


def draw_crops(figure: SubFigure, dataset: ImageDataset, index: int, image_size: int, name: str) -> None:
    """GoogLeNet's 144 crops of an image: their boxes on the photo, and below the crops, one row for each square."""
    image = dataset.image(index)
    crops = EvaluationCrops(image_size, count=144)
    # Of each square six crops; the mirrored ones come after all others.
    views = crops.views(*image.shape[:2])[:72]
    pixels = crops(image).reshape(2, 12, 6, image_size, image_size, -1)
    names = SQUARES["wide" if image.shape[1] >= image.shape[0] else "tall"]
    squares = [f"{views[6 * row].shorter_side} {names[row % 3]}" for row in range(12)]

    figure.suptitle(f"Evaluation: the 144 crops of one image ({name}), 4 scales x 3 squares x 6 crops x 2")
    above, below = cast(Sequence[SubFigure], figure.subfigures(2, 1, height_ratios=[1, 3.6]))
    for row, axes in enumerate(above.subplots(2, 6).flat):
        draw_boxes(axes, image, views[6 * row : 6 * (row + 1)])
        axes.set_title(squares[row], fontsize=9)
    axes = below.subplots()
    draw_mosaic(axes, [[*plain, *mirrored] for plain, mirrored in zip(*pixels, strict=True)])
    label_mosaic(axes, squares, [*PLACES, *(f"{place},\nmirrored" for place in PLACES)])
    for label, colour in zip(axes.get_xticklabels(), [*PLACES.values()] * 2, strict=True):
        label.set_color(colour)


def draw_boxes(axes: Axes, image: np.ndarray, views: Sequence[View]) -> None:
    """The photo with one square and its five smaller crops.

    Args:
        axes: To draw on.
        image: uint8, shape (H, W, channels).
        views: The six crops of the square.
    """
    axes.imshow(image if image.shape[2] == 3 else image[:, :, 0], cmap="gray", vmin=0, vmax=255, alpha=0.7)
    axes.set_axis_off()
    pixel = min(image.shape[:2]) / views[0].shorter_side
    for view, colour in zip(views, PLACES.values(), strict=True):
        corner = (view.left * pixel - 0.5, view.top * pixel - 0.5)  # imshow puts 0 at the middle of a pixel
        box = Rectangle(corner, view.side * pixel, view.side * pixel, fill=False, clip_on=False)
        box.set(edgecolor=colour, linewidth=1.5)
        axes.add_patch(box)


def draw_mosaic(axes: Axes, rows: Sequence[Sequence[np.ndarray]]) -> None:
    """Images of one size in rows, uint8, shape (size, size, channels)."""
    size, channels = rows[0][0].shape[1:]
    step = size + max(1, round(GAP * size))
    mosaic = np.full((step * len(rows), step * len(rows[0]), channels), 255, np.uint8)
    for row, images in enumerate(rows):
        for column, image in enumerate(images):
            mosaic[row * step : row * step + size, column * step : column * step + size] = image
    axes.imshow(mosaic if channels == 3 else mosaic[:, :, 0], cmap="gray", vmin=0, vmax=255)
    axes.set_yticks([(row + 0.47) * step for row in range(len(rows))])
    axes.set_xticks([(column + 0.47) * step for column in range(len(rows[0]))])


def label_mosaic(axes: Axes, rows: Sequence[str], columns: Sequence[str]) -> None:
    """Names of the rows on the left and of the columns above."""
    axes.tick_params(length=0, top=False, bottom=False, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.set_yticklabels(rows)
    axes.set_xticklabels(columns)


def shortened(name: str, length: int = 18) -> str:
    """A class name that fits above an image: the first of its synonyms."""
    name = name.split(",")[0]
    return name if len(name) <= length else f"{name[: length - 1]}…"


COMMANDS: dict[str, Any] = {"show": show}
