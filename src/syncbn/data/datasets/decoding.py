"""From the bytes of an image file to pixels: the one way that training, preparation and prediction share.

What is read, and by whom:

=========  =======  ==========================================================================================
kind       decoder  remarks
=========  =======  ==========================================================================================
JPEG       OpenCV   at reduced scale where fewer pixels are needed; one that was cut short is refused
PNG        OpenCV   of 16 bits the upper 8
BMP, WEBP  OpenCV
GIF        Pillow   the first picture
TIFF       Pillow   the first page, turned as its orientation says; more than 8 bits: OpenCV, scaled by what the
                    file says that its pixels hold
AVIF       Pillow   turned as its own transformations say
JPEG 2000  Pillow
=========  =======  ==========================================================================================

The kind is told by the content; names only decide which files of a folder are taken. No other decoder is reached.
Transparency is left out: the colours are those that the file stores below it. Colour profiles are not applied.
"""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import cv2
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.ExifTags import Base as ExifTag
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from syncbn.data.datasets.jpeg import EXIF, exif_of, find_frame, is_cut_short

SUFFIXES_OF_KIND = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"),
    "PNG": (".png", ".apng"),
    "BMP": (".bmp", ".dib"),
    "WEBP": (".webp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "AVIF": (".avif",),
    "JPEG 2000": (".jp2", ".j2k", ".jpx", ".jpf"),
}
"""The kinds that are read, and the endings of names, in small letters, by which files of a folder are taken."""

SUFFIXES = tuple(sorted(suffix for suffixes in SUFFIXES_OF_KIND.values() for suffix in suffixes))

REDUCTIONS = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
"""Factors by which a JPEG's decoder can shrink at no cost, with OpenCV's flags (the colours are a flag apart)."""

MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"BM", "BMP"),
    ((b"GIF87a", b"GIF89a"), "GIF"),
    ((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"), "TIFF"),
    ((b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51"), "JPEG 2000"),
)
"""How files of a kind begin; WebP and AVIF, which are containers, are told apart in `kind_of`."""

OF_PILLOW = {"GIF": "GIF", "TIFF": "TIFF", "AVIF": "AVIF", "JPEG 2000": "JPEG2000"}
"""The kinds that Pillow decodes, with its names of them."""

MAY_HOLD_EXIF = {"PNG": b"eXIf", "WEBP": b"EXIF"}
"""Bytes that a file of the kind has if it has EXIF; TIFF and AVIF have an orientation of their own."""

TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: lambda image: cv2.flip(image, 1),
    3: lambda image: cv2.rotate(image, cv2.ROTATE_180),
    4: lambda image: cv2.flip(image, 0),
    5: cv2.transpose,
    6: lambda image: cv2.rotate(image, cv2.ROTATE_90_CLOCKWISE),
    7: lambda image: cv2.rotate(cv2.transpose(image), cv2.ROTATE_180),
    8: lambda image: cv2.rotate(image, cv2.ROTATE_90_COUNTERCLOCKWISE),
}
"""What makes a stored image upright, by its EXIF orientation (EXIF 2.3, tag 274); 1 is upright."""

SIDEWAYS = frozenset({5, 6, 7, 8})
"""Orientations of images whose height and width change places."""

TIFF_TAGS = {
    "BitsPerSample": (258, 1),
    "SampleFormat": (339, 1),
    "PhotometricInterpretation": (262, 1),
    "PlanarConfiguration": (284, 1),
    "MaxSampleValue": (281, 0xFFFF),
}
"""What tells what a TIFF's numbers mean (TIFF 6.0), and what is meant where it is missing."""

UNSIGNED, WHITE_IS_ZERO, BIG_TIFF = {1, 4}, 0, 43

LFS_POINTER = b"version https://git-lfs"
"""How a file begins that Git LFS has in the place of one that was not fetched."""

DARK_LEVEL = 16
"""Of 256: 16-bit pixels that are all below it may be 12-bit pixels that nobody scaled."""


class DecodingError(ValueError):
    """A file is no image, not a whole one, or not of the kinds that are read; the message is the reason."""


class DarkPixelsWarning(UserWarning):
    """An image of 16 bits holds small numbers only."""


def kind_of(content: bytes) -> str | None:
    """What a file is by its content: a key of `SUFFIXES_OF_KIND`, or None."""
    for beginning, kind in MAGIC:
        if content.startswith(beginning):
            return kind
    if content[:4] == b"RIFF" and content[8:12] == b"WEBP":
        return "WEBP"
    if content[4:8] == b"ftyp":
        brands = content[8 : min(int.from_bytes(content[:4], "big"), 256)]
        return "AVIF" if b"avif" in brands or b"avis" in brands else None
    return None


def decode(content: bytes, channels: int = 3, reduction: int = 1, exif_orientation: bool = False) -> np.ndarray:
    """Decode an image.

    Args:
        content: A file.
        channels: 3 for RGB, 1 for grey.
        reduction: Of a JPEG 1, 2, 4 or 8: how many pixels in each direction become one. Its decoder does it by
            leaving out frequencies, which saves most of the decoding. Of other kinds 1.
        exif_orientation: Whether the image is turned as its EXIF says (JPEG, PNG, WebP).

    Returns:
        uint8, shape (H, W, channels); of a JPEG ceil(H / reduction) and ceil(W / reduction).

    Raises:
        DecodingError: It cannot be decoded to its end.
    """
    kind = kind_of(content)
    if content.startswith(LFS_POINTER):
        raise DecodingError("a pointer of Git LFS instead of the image: `git lfs pull` fetches it")
    if kind is None:
        raise DecodingError(
            f"no image of a known format: it begins with {content[:8].hex()}; {', '.join(SUFFIXES_OF_KIND)} are read"
            if content
            else "empty file"
        )
    if kind in OF_PILLOW:
        assert reduction == 1
        image = _decode_tiff(content) if kind == "TIFF" else _decode_by_pillow(content, kind)
        image = image if channels == 3 else cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    else:
        image = _decode_by_opencv(content, kind, channels, reduction)
        turn = TURNS.get(orientation_of(content)) if exif_orientation else None
        image = turn(image) if turn else image
    return image.reshape(*image.shape[:2], channels)


def orientation_of(content: bytes) -> int:
    """The EXIF orientation of a JPEG, PNG or WebP, 1 to 8; 1 where there is none or it is broken."""
    exif = exif_block(content)
    if not exif:
        return 1
    try:
        return read_orientation(exif)
    except Exception:  # whatever parsing junk may raise
        return 1


def exif_block(content: bytes) -> bytes:
    """The EXIF of a JPEG, PNG or WebP; empty where there is none."""
    kind = kind_of(content)
    if kind == "JPEG":
        return exif_of(content)
    if kind not in MAY_HOLD_EXIF or MAY_HOLD_EXIF[kind] not in content:
        return b""
    try:
        with _without_warnings(), Image.open(io.BytesIO(content), formats=[kind]) as image:
            if "exif" not in image.info:
                image.load()  # a PNG's may follow the pixels
            return image.info.get("exif", b"")
    except Exception:  # whatever a decoder raises on bad data, which is reported where the pixels are decoded
        return b""


def read_orientation(exif: bytes) -> int:
    """The orientation that a block of EXIF names, 1 to 8.

    Raises:
        Exception: It is broken.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block = Image.Exif()  # not image.getexif(): what that could not parse the first time it takes for empty
        block.load(exif if exif.startswith(EXIF) else EXIF + exif)
        orientation = block.get(ExifTag.Orientation, 1)
    return orientation if orientation in TURNS else 1


def _decode_by_opencv(content: bytes, kind: str, channels: int, reduction: int) -> np.ndarray:
    if kind == "JPEG" and is_cut_short(content):
        raise DecodingError("the image file is truncated: the JPEG has no end")
    colours = cv2.IMREAD_COLOR_RGB if channels == 3 else cv2.IMREAD_GRAYSCALE
    flags = colours | cv2.IMREAD_IGNORE_ORIENTATION | REDUCTIONS[reduction]
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flags)
    except cv2.error:  # of a header that names an impossible size
        image = None
    if image is None:
        frame = find_frame(content)
        if frame and frame.bits != 8:
            raise DecodingError(f"the JPEG has {frame.bits} bits a sample: 8 are read")
        raise DecodingError(f"the {kind} cannot be decoded: it is damaged or truncated")
    if kind == "PNG" and content[24] == 16:  # the depth in its header
        _warn_of_dark_pixels(image)
    return image


def _decode_by_pillow(content: bytes, kind: str) -> np.ndarray:
    """RGB, uint8."""
    try:
        with _without_warnings(), Image.open(io.BytesIO(content), formats=[OF_PILLOW[kind]]) as image:
            image.load()
            # What turns an AVIF is part of the format, as is a TIFF's orientation; Pillow hands it on as EXIF.
            return _to_rgb(ImageOps.exif_transpose(image))
    except DecodingError:
        raise
    except UnidentifiedImageError:
        raise DecodingError(f"the {kind} cannot be decoded: it is damaged, or of a sort that is not read") from None
    except Exception as error:  # whatever a decoder raises on bad data
        raise DecodingError(f"the {kind} cannot be decoded: {error}") from error


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "I;16":  # of JPEG 2000, scaled by its decoder from what the file says to 16 bits
        return cv2.cvtColor(_upper_bits(np.asarray(image)), cv2.COLOR_GRAY2RGB)
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        raise DecodingError(f"its pixels are of the kind {image.mode!r}, whose range the file does not say")
    if image.mode == "La":  # premultiplied
        image = image.convert("LA")
    return np.array(image.convert("RGB"))


def _decode_tiff(content: bytes) -> np.ndarray:
    """The first page: RGB, uint8.

    Pixels of 9 to 16 bits are OpenCV's, which reads all their bits and moves those of 10, 12 and 14 up to 16; tags tell
    what they mean.
    """
    bits, formats, photometric, planar, highest = (_tiff_tags(content)[name] for name in TIFF_TAGS)
    depth = max(bits)
    if depth > 16 or not set(formats) <= UNSIGNED:
        kind = "floating-point" if 3 in formats else "signed" if depth <= 16 else f"{depth}-bit"
        raise DecodingError(f"the TIFF holds {kind} numbers, whose range it does not say: save it with 8 or 16 bits")
    if depth <= 8:
        return _decode_by_pillow(content, "TIFF")
    if photometric[0] not in (WHITE_IS_ZERO, 1, 2) or planar[0] != 1:
        raise DecodingError(
            f"the TIFF holds {depth}-bit pixels other than grey and interleaved RGB: save it with 8 bits"
        )
    pixels = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if pixels is None or pixels.dtype != np.uint16:
        raise DecodingError(f"the TIFF of {depth} bits cannot be decoded: it is damaged, or of a sort that is not read")
    image = _upper_bits(pixels, max(highest).bit_length() if depth == 16 else 16)
    image = 255 - image if photometric[0] == WHITE_IS_ZERO else image
    channels = 1 if image.ndim == 2 else image.shape[2]
    return cv2.cvtColor(image, {1: cv2.COLOR_GRAY2RGB, 3: cv2.COLOR_BGR2RGB, 4: cv2.COLOR_BGRA2RGB}[channels])


def _tiff_tags(content: bytes) -> dict[str, tuple[int, ...]]:
    """The numbers of `TIFF_TAGS` of a TIFF's first page."""
    try:
        with _without_warnings():
            tags = ImageFileDirectory_v2(content[: 16 if content[2] == BIG_TIFF else 8])
            file = io.BytesIO(content)
            file.seek(tags.next)
            tags.load(file)
            values = {name: tags.get(number, default) for name, (number, default) in TIFF_TAGS.items()}
            return {name: tuple(map(int, np.atleast_1d(value))) for name, value in values.items()}
    except Exception as error:  # whatever parsing junk may raise
        raise DecodingError(f"the TIFF cannot be decoded: {error}") from error


def _upper_bits(pixels: np.ndarray, bits: int = 16) -> np.ndarray:
    """The upper 8 of so many bits; a warning where they are all but 0, as of 12 bits in 16 that nobody scaled."""
    image = np.minimum(pixels >> max(bits - 8, 0), 255).astype(np.uint8)
    if bits == 16:
        _warn_of_dark_pixels(image)
    return image


def _warn_of_dark_pixels(image: np.ndarray) -> None:
    if image.max() < DARK_LEVEL:
        warnings.warn(
            "an image of 16 bits holds no number above 4095 and comes out nearly black: perhaps its pixels have 12 bits"
            " or fewer, which the file does not say; scale them to 16. `syncbn prepare` names all such files",
            DarkPixelsWarning,
            stacklevel=2,
        )


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Without Pillow's, about EXIF and palettes, which do not matter here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
