"""The loader on photos of ImageNet at their original size: decoding and augmentation, workers, memory.

    syncbn benchmark --section loader                                 # all parts; about four minutes of one core
    syncbn benchmark --section loader --loader.photos PHOTOS --loader.part decode --loader.rounds 31

Part "decode": from a file to 224 x 224 pixels, randomly cropped and mirrored, on one core, in CPU time, since the
machine may be shared. Contenders read the same files and draw windows of the same distribution:
- "syncbn": `BatchedImages.prepared_image`, what a worker of the trainer does for an image;
- "OpenCV loop": decode, cut out, `cv2.resize`, flip, and nothing else;
- "Pillow": the same in Pillow;
- "torchvision style": RandomResizedCrop, RandomHorizontalFlip and ToTensor as torchvision writes them for Pillow.
Part "workers": one and two worker processes, in wall time, in turns; it means something only on two idle cores.
Part "memory": resident memory of one process that reads shards for many epochs, without what is free in its heap.
"""

import ctypes
import gc
import math
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import torch
from PIL import Image
from rich.console import Console
from torch.utils.data import DataLoader

from syncbn.benchmarks.harness import measure, report
from syncbn.benchmarks.harness.measure import OURS, Measurement
from syncbn.data import (
    Augmentation,
    BatchedImages,
    GlobalBatchSampler,
    ImageBatch,
    ImageDataset,
    ImageFolderDataset,
    RandomCrop,
    SampleKey,
    ShardDataset,
    WindowedOrder,
    WindowReader,
)
from syncbn.data.datasets.selection import Selection
from syncbn.data.datasets.shard_files import SAMPLE_DTYPE, Shard, ShardIndex, make_split, shard_name, write_shard
from syncbn.data.loading.batches import keep_batch

PIXELS = 224
AREA, ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
# Of 255 levels, from INTER_AREA, averaged over the photos: interpolations are off by 1 to 3; mirrored images, images 12
# pixels aside or of swapped colours by 20 to 50. On a single photo (quilt, 13) the two cannot be told apart.
MEAN_DIFFERENCE = 5.0
KEEP_MEMORY = False
Box = tuple[int, int, int, int]  # top, left, height, width


def random_window(height: int, width: int) -> Box:
    """GoogLeNet's crop, as torchvision's RandomResizedCrop draws it."""
    for _ in range(10):
        area = height * width * random.uniform(*AREA)
        aspect = math.exp(random.uniform(math.log(ASPECT[0]), math.log(ASPECT[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return random.randint(0, height - h), random.randint(0, width - w), h, w
    return 0, 0, height, width


# ---- contenders: a file, a window or None for a random one, mirrored or None for at random --------


def opencv(path: Path, window: Box | None = None, mirrored: bool | None = None) -> np.ndarray:
    """uint8 RGB, (PIXELS, PIXELS, 3)."""
    image = cv2.imdecode(np.frombuffer(path.read_bytes(), np.uint8), cv2.IMREAD_COLOR_RGB)
    assert image is not None, path
    top, left, height, width = window or random_window(*image.shape[:2])
    image = cv2.resize(image[top : top + height, left : left + width], (PIXELS, PIXELS))
    mirrored = random.random() < 0.5 if mirrored is None else mirrored
    return cv2.flip(image, 1) if mirrored else image


def pillow_image(path: Path, window: Box | None, mirrored: bool | None) -> Image.Image:
    """RGB, of PIXELS x PIXELS."""
    with Image.open(path) as file:
        image = file.convert("RGB")
    top, left, height, width = window or random_window(image.height, image.width)
    image = image.crop((left, top, left + width, top + height)).resize((PIXELS, PIXELS), Image.Resampling.BILINEAR)
    mirrored = random.random() < 0.5 if mirrored is None else mirrored
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image


def pillow(path: Path, window: Box | None = None, mirrored: bool | None = None) -> np.ndarray:
    """uint8 RGB, (PIXELS, PIXELS, 3)."""
    return np.asarray(pillow_image(path, window, mirrored))


def torchvision_style(path: Path, window: Box | None = None, mirrored: bool | None = None) -> torch.Tensor:
    """float32 RGB of 0..1, (3, PIXELS, PIXELS)."""
    image = torch.from_numpy(np.array(pillow_image(path, window, mirrored)))
    return image.permute(2, 0, 1).contiguous().to(torch.float32).div(255)


def make_up_photos(folder: Path, count: int) -> None:
    """Write JPEG files like ImageNet's: 456 x 394 pixels, structure at every scale, about 100 kB."""
    random_numbers = np.random.default_rng(0)
    size = (456, 394)
    for number in range(count):
        image = np.full((size[1], size[0], 3), 128.0)
        for scale in (2, 4, 8, 16, 32, 64, 128):
            shape = (size[1] // scale + 2, size[0] // scale + 2, 3)
            image += cv2.resize(random_numbers.normal(0, 4.0 * scale**0.75, shape), size, interpolation=cv2.INTER_CUBIC)
        quality = [cv2.IMWRITE_JPEG_QUALITY, 98]
        cv2.imwrite(str(folder / f"{number:03d}.jpg"), image.clip(0, 255).astype(np.uint8), quality)


def verify(paths: Sequence[Path], images: BatchedImages) -> None:
    """Refuse a contender that makes something else of the photos.

    Raises:
        measure.WrongContender: naming it.
    """
    differences: dict[str, list[float]] = {}
    for index, path in enumerate(paths):
        whole = cv2.imread(str(path), cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
        assert whole is not None, path
        height, width = whole.shape[:2]
        window = (height // 8, width // 4, height // 2, width // 2)
        side = min(height, width)
        centre = averaged(whole, ((height - side) // 2, (width - side) // 2, side, side))
        mirrored = averaged(whole, window)[:, ::-1]
        tensor = torchvision_style(path, window, True).permute(1, 2, 0).numpy() * 255
        for name, found, expected in (
            (OURS, images.prepared_image(SampleKey(0, index)).reshape(centre.shape), centre),
            ("OpenCV loop", opencv(path, window, True), mirrored),
            ("Pillow", pillow(path, window, True), mirrored),
            ("torchvision style", tensor, mirrored),
        ):
            differences.setdefault(name, []).append(float(np.abs(found.astype(np.float64) - expected).mean()))
    for name, values in differences.items():
        if not statistics.fmean(values) <= MEAN_DIFFERENCE:
            off = f"{statistics.fmean(values):.1f} levels (at most {MEAN_DIFFERENCE:g})"
            raise measure.WrongContender(f"{name!r} is off by {off}")


def averaged(image: np.ndarray, window: Box) -> np.ndarray:
    """A window of an image, each pixel the mean of those it stands for: (PIXELS, PIXELS, 3)."""
    top, left, height, width = window
    return cv2.resize(image[top : top + height, left : left + width], (PIXELS, PIXELS), interpolation=cv2.INTER_AREA)


# ---- sections ------------------------------------------------------------------------------------


def measure_decoding(dataset: ImageFolderDataset, augmentation: Augmentation, rounds: int) -> list[Measurement]:
    """All photos once a round, each contender in turn."""
    paths = [dataset.path(index) for index in range(len(dataset))]
    verify(paths, BatchedImages(dataset, PIXELS))
    images = BatchedImages(dataset, PIXELS, augmentation)
    epochs = iter(range(10**9))

    def ours() -> None:
        epoch = next(epochs)
        for index in range(len(paths)):
            images.prepared_image(SampleKey(epoch, index))

    def loop(prepare: Callable[[Path], object]) -> None:
        for path in paths:
            prepare(path)

    contenders: dict[str, Callable[[], None]] = {
        OURS: ours,
        "OpenCV loop": partial(loop, opencv),
        "Pillow": partial(loop, pillow),
        "torchvision style": partial(loop, torchvision_style),
    }
    times = measure.time_in_turns(contenders, rounds, warmup=1, timer=measure.cpu_time)
    per_photo = {name: [value / len(paths) for value in values] for name, values in times.items()}
    return measure.rows_of("decode", f"a photo to {PIXELS} px", "contiguous", 1, per_photo)


def measure_workers(dataset: ImageDataset, augmentation: Augmentation, rounds: int, images: int) -> list[Measurement]:
    """Images per second of wall time behind one and two workers, without their start."""
    rates: dict[int, list[float]] = {1: [], 2: []}
    repeated = Selection(dataset, np.arange(images) % len(dataset))
    batches = BatchedImages(repeated, PIXELS, augmentation)
    for _ in range(rounds):
        for workers, found in rates.items():
            sampler = GlobalBatchSampler(images, 20)
            options: Any = {"batch_sampler": sampler, "collate_fn": keep_batch, "num_workers": workers}
            loader = DataLoader(batches, **options)
            found.append(steady_rate(loader))
    ratio = statistics.median(two / one for one, two in zip(rates[1], rates[2], strict=True))
    return [
        row("workers", f"{workers} worker{'s' if workers > 1 else ''}", found, ratio if workers > 1 else 1, "images/s")
        for workers, found in rates.items()
    ]


def steady_rate(loader: DataLoader[ImageBatch]) -> float:
    """Images per second from the first batch to the last."""
    batches = iter(loader)
    next(batches)
    start = time.perf_counter()
    count = sum(len(batch.labels) for batch in batches)
    return count / (time.perf_counter() - start)


def measure_memory(
    photos: ImageFolderDataset, augmentation: Augmentation, images: int, folder: Path
) -> list[Measurement]:
    """Megabytes resident in this process after each tenth of the images, read from shards without workers.

    Raises:
        ValueError: The system is not Linux.
    """
    if sys.platform != "linux":
        raise ValueError("the memory of this process is read from /proc/self/statm, which only Linux has")
    shards = shards_of(photos, folder, copies=10)
    assert shards.layout is not None
    order = WindowedOrder(shards.layout, 2, seed=0)
    sampler = GlobalBatchSampler(len(shards), 50, order=order)
    batches = BatchedImages(shards, PIXELS, augmentation, reader=WindowReader(shards, sampler, order))
    options: Any = {"batch_sampler": sampler, "collate_fn": keep_batch}
    loader = DataLoader(batches, **options)
    rows: list[Measurement] = []
    seen, epoch = 0, 0
    while seen < images:
        sampler.set_epoch(epoch)
        for batch in loader:
            seen += len(batch.labels)
            if seen >= images * (len(rows) + 1) / 10:
                give_back_memory()
                rows.append(row("memory", f"after {seen:,} images", [resident_megabytes()], 1, "MB resident"))
        epoch += 1
    first = rows[0].median
    return [row(r.section, r.shape, [r.median], r.median / first, r.unit) for r in rows]


def shards_of(photos: ImageFolderDataset, folder: Path, copies: int) -> ShardDataset:
    """Each copy of the photos is a shard."""
    shards, records = [], []
    for number in range(copies):
        path = folder / shard_name("train", number)
        samples = ((f"{number}_{i}", photos.encoded(i), photos.label(i)) for i in range(len(photos)))
        records += [(number, *place) for place in write_shard(path, samples)]
        shards.append(Shard(path.name, len(photos), path.stat().st_size, ""))
    split = make_split(shards, np.array(records, SAMPLE_DTYPE), len(photos.classes))
    return ShardDataset(
        ShardIndex(folder, photos.classes, photos.classes, photos.mean, photos.std, {"train": split}), "train"
    )


def give_back_memory() -> None:
    """Give the system what is free: how much glibc keeps of large batches depends on the luck of the heap's layout."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def resident_megabytes() -> float:
    """Of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def row(section: str, shape: str, values: list[float], ratio: float, unit: str) -> Measurement:
    """A line that is no time."""
    p20, median, p80 = (measure.percentile(values, q) for q in (0.2, 0.5, 0.8))
    return Measurement(section, shape, "contiguous", 1, OURS, median, p20, p80, ratio, unit)


def print_other_rows(rows: Sequence[Measurement], console: Console) -> None:
    """Print what the table leaves out."""
    for found in rows:
        if found.unit != "ms":
            line = f"{found.section}: {found.shape}: {found.median:.0f} {found.unit} ({found.ratio:.2f} of the first)"
            console.print(line, soft_wrap=True)


def run(
    photos: Path | None = None,
    part: Literal["all", "decode", "workers", "memory"] = "all",
    augmentation: Augmentation = Augmentation(crop=RandomCrop()),  # noqa: B008 - frozen
    rounds: int = 15,
    images: int = 50_000,
    quick: bool = False,
    output: Path = measure.RESULTS,
) -> None:
    """Time the loader against OpenCV, Pillow and torchvision's way, and watch its memory.

    Args:
        photos: folder of JPEG files at their original size; ImageNet's, to compare with our figures. None makes
            some up, of about the same size in pixels and bytes.
        part: which comparison.
        augmentation: of syncbn.
        rounds: timings of each contender that count.
        images: how many part "memory" reads.
        quick: a smoke run on a few photos.
        output: folder for the CSV and the figure.

    Raises:
        ValueError: there is no such folder.
    """
    if photos is not None and not photos.is_dir():
        raise ValueError(f"--loader.photos {photos} is not a folder: name one of JPEG files, or leave it out")
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    console = report.console()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "photos").mkdir()
        count = 10 if quick else 100
        if photos is None:
            make_up_photos(folder / "photos", count)
        else:
            for path in sorted(photos.iterdir())[:count]:
                (folder / "photos" / path.name).symlink_to(path.resolve())
        dataset = ImageFolderDataset(folder)
        if quick:
            rounds, images = 2, 200
        rows: list[Measurement] = []
        if part in ("all", "decode"):
            rows += measure_decoding(dataset, augmentation, rounds)
        if part in ("all", "workers"):
            rows += measure_workers(dataset, augmentation, min(rounds, 5), 40 if quick else 600)
        if part == "memory" or (part == "all" and sys.platform == "linux"):
            rows += measure_memory(dataset, augmentation, images, folder)
    if part in ("all", "decode"):
        title = f"Loader: CPU time of a photo{'' if photos else ' (made up)'}, {augmentation}"
        report.publish_results(rows, output, "loader", report.titled(title, quick), 1, console)
    print_other_rows(rows, console)
