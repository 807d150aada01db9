"""The plan for ImageNet's archives as they are downloaded, read in place."""

import gzip
import io
import re
import tarfile
import zlib
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from syncbn.data.datasets.shard_files import sample_key
from syncbn.data.preparation.archives import Member, scan_archive
from syncbn.data.preparation.plan import PreparationPlan, SourceFinding, SourceImage, shuffled, with_unique_keys
from syncbn.data.preparation.workers import finished, progress_bar

TRAIN_ARCHIVE = "ILSVRC2012_img_train.tar"
VAL_ARCHIVE = "ILSVRC2012_img_val.tar"
DEVKIT_ARCHIVE = "ILSVRC2012_devkit_t12.tar.gz"

META_FILE = "data/meta.mat"
GROUND_TRUTH_FILE = "data/ILSVRC2012_validation_ground_truth.txt"

VAL_NAME = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")


@dataclass(frozen=True)
class Devkit:
    """What the development kit says about the images.

    Attributes:
        wnids: Identifiers of the classes, sorted, which is the order of the labels.
        words: Their names for people.
        train_counts: How many training images each has.
        val_labels: The label of each validation image, in order.
    """

    wnids: tuple[str, ...]
    words: tuple[str, ...]
    train_counts: tuple[int, ...]
    val_labels: tuple[int, ...]


def read_devkit(path: Path) -> Devkit:
    """Read classes and ground truth from the development kit.

    Labels count the sorted wnids from 0, as torchvision and every folder of classes have them; the ground truth
    counts by the kit's own ILSVRC2012_ID instead, and is translated.

    Args:
        path: Of ILSVRC2012_devkit_t12.tar.gz.

    Raises:
        ValueError: The kit is broken or incomplete, or scipy is not installed.
    """
    try:
        from scipy.io import loadmat  # a large package for one small file: in the extra of this package, not required
    except ImportError as error:
        raise ValueError(f"reading {path.name} takes scipy: pip install 'syncbn[imagenet]'") from error
    files = _read_files(path, META_FILE, GROUND_TRUTH_FILE)
    try:
        synsets = loadmat(io.BytesIO(files[META_FILE]), squeeze_me=True)["synsets"]
        rows = [
            (str(row["WNID"]), str(row["words"]), int(row["num_train_images"]), int(row["ILSVRC2012_ID"]))
            for row in synsets.reshape(-1)
            if row["num_children"] == 0  # the rest are the inner nodes of WordNet above the classes
        ]
        truth = [int(line) for line in files[GROUND_TRUTH_FILE].split()]
    except Exception as error:  # whatever loadmat may raise on junk
        raise ValueError(f"{path} is broken ({type(error).__name__}: {error}): download it again") from error
    rows.sort()
    label_of = {identifier: label for label, (*_, identifier) in enumerate(rows)}
    unknown = sorted(set(truth) - set(label_of))
    if unknown:
        raise ValueError(f"{path}: the ground truth names the class {unknown[0]}, which meta.mat lacks")
    return Devkit(
        wnids=tuple(row[0] for row in rows),
        words=tuple(row[1] for row in rows),
        train_counts=tuple(row[2] for row in rows),
        val_labels=tuple(label_of[identifier] for identifier in truth),
    )


def _read_files(path: Path, *endings: str) -> dict[str, bytes]:
    """The files of a gzipped tar whose names end so."""
    contents = {}
    try:
        with tarfile.open(path, "r:gz") as archive:
            for member in archive:
                file = archive.extractfile(member)
                for ending in endings:
                    if file is not None and member.name.endswith(ending):
                        contents[ending] = file.read()
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is broken ({error}): download it again") from error
    missing = set(endings) - set(contents)
    if missing:
        raise ValueError(f"{path} lacks {min(missing)}: it is not the development kit of ILSVRC2012's tasks 1 and 2")
    return contents


def plan_imagenet(source: Path, pool: ProcessPoolExecutor) -> PreparationPlan:
    """Plan from the headers of the archives.

    Args:
        source: The folder with the three archives.
        pool: Lists the classes, which are one archive each.

    Raises:
        ValueError: An archive is missing, or the development kit is broken.
    """
    missing = [name for name in (TRAIN_ARCHIVE, VAL_ARCHIVE, DEVKIT_ARCHIVE) if not (source / name).is_file()]
    if missing:
        raise ValueError(f"{source} lacks {', '.join(missing)}: download from https://image-net.org (ILSVRC2012)")
    devkit = read_devkit(source / DEVKIT_ARCHIVE)
    findings: list[SourceFinding] = []
    train = _plan_train(source / TRAIN_ARCHIVE, devkit, pool, findings)
    val = _plan_val(source / VAL_ARCHIVE, devkit, findings)
    return PreparationPlan(devkit.wnids, devkit.words, {"train": shuffled(train), "val": val}, tuple(findings))


def _plan_train(
    path: Path, devkit: Devkit, pool: ProcessPoolExecutor, findings: list[SourceFinding]
) -> list[SourceImage]:
    """The training images by class, in the order of the archive."""
    archives, damages = scan_archive(path)
    findings += [SourceFinding("train", path.name, damage, 0) for damage in damages]
    by_wnid: dict[str, Member] = {}
    for archive in archives:
        wnid = PurePosixPath(archive.name).name.removesuffix(".tar")
        if wnid in devkit.wnids and wnid not in by_wnid:
            by_wnid[wnid] = archive
        else:
            findings.append(SourceFinding("train", archive.name, "is the archive of no class, or the second of one", 0))
    scans: dict[str, tuple[list[Member], list[str]]] = {}
    with progress_bar() as progress:
        task = progress.add_task("listing classes", total=len(by_wnid))
        for (wnid, _), scan in finished(pool, _scan_class, by_wnid.items(), path):
            scans[wnid] = scan
            progress.advance(task)
    images: list[SourceImage] = []
    for label, (wnid, expected) in enumerate(zip(devkit.wnids, devkit.train_counts, strict=True)):
        members, damages = scans.get(wnid, ([], []))
        findings += [SourceFinding("train", f"{wnid}.tar", damage, 0) for damage in damages]
        images += [_source_image(path, member, label) for member in members if member.whole]
        whole = sum(member.whole for member in members)
        if whole != expected or not whole:
            reason = f"has {whole or 'no'} whole images, {expected} by the development kit"
            findings.append(SourceFinding("train", f"{wnid}.tar", reason, max(expected - whole, 0)))
    return with_unique_keys(images)


def _scan_class(item: tuple[str, Member], path: Path) -> tuple[list[Member], list[str]]:
    """List the images of one class: ``item`` is its wnid and its archive."""
    archive = item[1]
    return scan_archive(path, archive.offset, archive.offset + archive.size)


def _plan_val(path: Path, devkit: Devkit, findings: list[SourceFinding]) -> list[SourceImage]:
    """The validation images in the order of their numbers."""
    members, damages = scan_archive(path)
    findings += [SourceFinding("val", path.name, damage, 0) for damage in damages]
    numbered: dict[int, Member] = {}
    for member in members:
        match = VAL_NAME.fullmatch(PurePosixPath(member.name).name)
        number = int(match[1]) if match else 0
        if not member.whole:
            continue
        if 1 <= number <= len(devkit.val_labels) and number not in numbered:
            numbered[number] = member
        else:
            findings.append(
                SourceFinding("val", member.name, "is no image of the ground truth, or one a second time", 0)
            )
    missing = sorted(set(range(1, len(devkit.val_labels) + 1)) - set(numbered))
    if missing:
        reason = f"lacks {len(missing)} of {len(devkit.val_labels)} images, the first number {missing[0]}"
        findings.append(SourceFinding("val", path.name, reason, len(missing)))
    return [_source_image(path, numbered[number], devkit.val_labels[number - 1]) for number in sorted(numbered)]


def _source_image(path: Path, member: Member, label: int) -> SourceImage:
    name = PurePosixPath(member.name)
    return SourceImage(str(path), member.offset, member.size, name.name, sample_key(name.stem), label)
