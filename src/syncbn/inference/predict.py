"""``syncbn predict WEIGHTS IMAGES...``: what is on photos, or where they lie in an embedding, by any weights."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from syncbn.data.datamodule import use_one_thread
from syncbn.data.datasets.image_folder import in_words
from syncbn.data.loading.batches import BatchedImages, ImageBatch, keep_batch
from syncbn.data.loading.samplers import SampleKey
from syncbn.inference.images import prepare_images, search_images
from syncbn.inference.writers import Embedding, Prediction, PredictionFormat, choose_writer, opened_writer
from syncbn.models.weights import ModelCard, build_network, check_input, read_weights, require_folder
from syncbn.nn import fold_batch_norm
from syncbn.paths import ExpandingParser
from syncbn.progress import ProgressLines
from syncbn.run_folders import file_of_weights

TOP_K = 5


def predict(
    weights: Path,
    images: list[str],
    top_k: int | None = None,
    format: PredictionFormat | None = None,
    output: Path | None = None,
    batch_size: int = 32,
    crops: int = 1,
    num_workers: int = 0,
    device: str = "auto",
    exif_orientation: bool | None = None,
) -> int:
    """Say what is on images: the most probable classes and their probabilities; or their embeddings, for retrieval.

    The weights bring their network, the names of the classes and what images they want. Images that cannot be read are
    named and left out; the exit status is then 2. The test set of a config, on any number of ranks and with several
    networks, is predicted by `syncbn predict --config CONFIG --ckpt_path CKPT`.

    Args:
        weights: A checkpoint of `syncbn fit`, or the folder of its run, whose best checkpoint is taken; what `syncbn
            import` wrote, or whatever that reads.
        images: Files, folders or quoted patterns ('photos/**/*.jpg').
        top_k: How many classes of each image; 5 without it.
        format: Of classes: "table" to read; "csv", a line for each image and class; "jsonl", a line of JSON for each
            image. Of embeddings: "csv", a line for each image; "jsonl"; "npz", NumPy's archive with the paths as
            ``images`` and the numbers as ``embeddings``. Without it the first of these.
        output: File to write instead of the screen.
        batch_size: Images at a time; fewer with several crops.
        crops: Parts of an image over which the probabilities are averaged: 1, its centre; 10; or 144, GoogLeNet's.
        num_workers: Processes that decode the images. 0 decodes them in this one.
        device: "cpu", "cuda", "cuda:1" ...; "auto" takes a GPU where there is one.
        exif_orientation: Whether images are turned as their EXIF says. Without it, as those were that the weights were
            trained on; not, where the weights do not say it.

    Returns:
        Exit status: 0, or 2 where an image was left out.

    Raises:
        ValueError: The weights cannot be read, there are no such images, or an argument is out of range.
    """
    for name, value in (("top_k", top_k), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1")
    paths, others = search_images(images)
    if others:
        print(f"syncbn: no images by their names: {in_words(others)}", file=sys.stderr)
    weights = file_of_weights(weights)
    content = read_weights(weights)
    check_embedding(content.card, top_k, crops)
    kind = choose_writer(format, output, content.card)
    if output is not None:
        check_output(output, weights)
    where = choose_device(device)
    trained = build_network(content)
    check_input(content.card, trained)
    network = fold_batch_norm(trained).to(where)
    card = content.card if exif_orientation is None else replace(content.card, exif_orientation=exif_orientation)
    prepared = prepare_images(paths, card, crops)
    left_out = 0
    with opened_writer(kind, output, content.card) as writer, ProgressLines() as lines:
        task = lines.add_task("predicting images", total=len(paths))
        for batch in load_batches(prepared, max(1, batch_size // crops), num_workers):
            if content.card.embedding_dimension is None:
                items: list[Any] = predict_batch(network, batch, paths, top_k or TOP_K, where)
            else:
                items = embed_batch(network, batch, paths, where)
            for item in items:
                writer.write(item)
            for message in batch.left_out:
                left_out += 1
                print(f"syncbn: left out: {message}", file=sys.stderr)
            lines.advance(task, len(items) + len(batch.left_out))
    if left_out:
        print(f"syncbn: {left_out} of {len(paths)} images were left out", file=sys.stderr)
    return 2 if left_out else 0


def check_output(output: Path, weights: Path) -> None:
    """Refuse a file that cannot be written, or that would be written over the weights.

    Raises:
        ValueError: There is no such folder, or it is the file of weights.
    """
    require_folder(output)
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder: name a file in it")
    if output.exists() and weights.exists() and output.samefile(weights):
        raise ValueError(f"--output {output} is the file of weights itself: name another")


def check_embedding(card: ModelCard, top_k: int | None, crops: int) -> None:
    """Refuse what has a meaning for classes alone.

    Raises:
        ValueError: The weights give embeddings, and an option of classes is given.
    """
    if card.embedding_dimension is None:
        return
    if top_k is not None:
        raise ValueError(f"--top_k {top_k} has no meaning with these weights, which give embeddings: leave it out")
    if crops != 1:
        raise ValueError(f"--crops {crops} has no meaning with these weights, which give embeddings: leave it out")


def choose_device(name: str) -> torch.device:
    """The device that a word names.

    Raises:
        ValueError: There is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {name} is not there: {str(error).splitlines()[0]}") from error
    return torch.device(name)


def load_batches(images: BatchedImages, batch_size: int, num_workers: int) -> Iterator[ImageBatch]:
    """All images in order."""
    keys = [SampleKey(0, index) for index in range(len(images))]
    sampler = BatchSampler(SequentialSampler(keys), batch_size, drop_last=False)
    batches = [[keys[place] for place in batch] for batch in sampler]
    yield from DataLoader(
        images,
        batch_sampler=batches,
        collate_fn=keep_batch,  # type: ignore[arg-type]  # batches come whole
        num_workers=num_workers,
        worker_init_fn=use_one_thread,
    )


@torch.inference_mode()
def predict_batch(
    network: nn.Module, batch: ImageBatch, paths: Sequence[Path], top_k: int, device: torch.device
) -> list[Prediction]:
    """The predictions of a batch; the probabilities of an image's crops are averaged."""
    if not len(batch.images):
        return []
    images = batch.images.to(device)
    probabilities: Tensor = network(images.flatten(0, -4)).softmax(1)
    if images.ndim == 5:
        probabilities = probabilities.unflatten(0, images.shape[:2]).mean(1)
    values, labels = probabilities.topk(min(top_k, probabilities.shape[1]))
    return [
        Prediction(paths[index], tuple(row_of_labels), tuple(row_of_values))
        for index, row_of_labels, row_of_values in zip(
            batch.indices.tolist(), labels.tolist(), values.tolist(), strict=True
        )
    ]


@torch.inference_mode()
def embed_batch(network: nn.Module, batch: ImageBatch, paths: Sequence[Path], device: torch.device) -> list[Embedding]:
    """The embeddings of a batch."""
    if not len(batch.images):
        return []
    rows = network(batch.images.to(device)).cpu().numpy()
    return [Embedding(paths[index], row) for index, row in zip(batch.indices.tolist(), rows, strict=True)]


def run(arguments: Sequence[str]) -> int:
    """Parse the words after ``syncbn predict`` and do what they say.

    Returns:
        The exit status.
    """
    assert predict.__doc__
    parser = ExpandingParser(
        prog="syncbn predict", exit_on_error=False, description=predict.__doc__.partition("Args:")[0]
    )
    parser.add_argument(
        "weights", type=Path, help="A run folder, a checkpoint, or any file that `syncbn import` reads."
    )
    # As a list that a shell may have expanded, which jsonargparse does not make of a function's parameter.
    parser.add_argument("images", type=str, nargs="+", help="Files, folders or quoted patterns ('photos/**/*.jpg').")
    parser.add_function_arguments(predict, skip={"weights", "images"})
    return predict(**parser.parse_args(list(arguments)).as_dict())
