"""One image: decoded in full, repaired where needed, turned and made smaller where asked for.

Pixels are those that training sees, of the same decoder; a JPEG whose pixels stay is copied byte by byte, if Pillow too
decodes it to its end. Damage in the middle of the data, which both gloss over, is not noticed.
"""

import io
import math
import warnings

import numpy as np
from PIL import Image

from syncbn.data.datasets.decoding import (
    DarkPixelsWarning,
    DecodingError,
    decode,
    exif_block,
    kind_of,
    orientation_of,
    read_orientation,
)
from syncbn.data.datasets.jpeg import find_frame, is_cut_short, without_exif


class UnusableImage(Exception):
    """An image that cannot be kept; the message is the reason."""


def convert_image(
    content: bytes, shorter_side: int | None, quality: int, exif_orientation: bool = False
) -> tuple[bytes, str]:
    """Check an image and make of it a JPEG that every reader decodes to the same pixels.

    The bytes of a healthy JPEG are returned as they are, unless it is turned or made smaller. EXIF that is broken, or
    that asks for a rotation, does not stay, since readers differ in whether they rotate.

    Args:
        content: Of the file.
        shorter_side: In pixels, of what is returned; a smaller image, and any where this is None, keeps its size.
        quality: Of JPEG, 1 to 100, where the image is encoded again.
        exif_orientation: Whether an image is turned as its EXIF says. ImageNet's are not: its labels and accuracies are
            about the pixels as stored.

    Returns:
        The bytes of a JPEG, grey or RGB, and what was repaired (empty if nothing).

    Raises:
        UnusableImage: It cannot be decoded to its end.
    """
    kind, frame = kind_of(content), find_frame(content)
    orientation = orientation_of(content) if exif_orientation else 1
    repairs = []
    if kind != "JPEG":
        repairs.append(f"{kind} to JPEG")
    elif frame and frame.components == 4:
        repairs.append("CMYK to RGB")
    if orientation != 1:
        repairs.append(f"turned as its EXIF says (orientation {orientation})")
    if frame and not repairs and min(frame.height, frame.width) <= (shorter_side or math.inf):
        if not is_cut_short(content) and _is_whole_jpeg(content):
            flaw = _exif_flaw(content)
            return (without_exif(content), flaw) if flaw else (content, "")
        repairs.append("damaged JPEG encoded again")
    pixels, remarks = _decode(content, exif_orientation)
    image = Image.fromarray(pixels)
    if shorter_side is not None and min(image.size) > shorter_side:
        image = _resize(image, shorter_side)
    return _encode(image, quality), ", ".join([*repairs, *remarks])


def _decode(content: bytes, exif_orientation: bool) -> tuple[np.ndarray, list[str]]:
    """The pixels, RGB, uint8, and what is remarkable about them."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DarkPixelsWarning)
        try:
            pixels = decode(content, exif_orientation=exif_orientation)
        except DecodingError as error:
            raise UnusableImage(str(error)) from error
    dark = any(warning.category is DarkPixelsWarning for warning in caught)
    return pixels, ["nearly black: its 16 bits may hold 12"] if dark else []


def _is_whole_jpeg(content: bytes) -> bool:
    """Whether readers that are stricter than OpenCV, such as Pillow, decode a JPEG too."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about EXIF, and large images
            with Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
                image.load()
    except Exception:  # whatever a decoder raises on bad data
        return False
    return True


def _resize(image: Image.Image, shorter_side: int) -> Image.Image:
    """The image with its shorter side as given, low-pass filtered (Pillow's filters widen as they shrink)."""
    scale = shorter_side / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _encode(image: Image.Image, quality: int) -> bytes:
    """An RGB image as JPEG, a grey one where all its pixels are grey."""
    red, green, blue = np.moveaxis(np.asarray(image), -1, 0)
    if np.array_equal(red, green) and np.array_equal(red, blue):
        image = image.getchannel(0)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def _exif_flaw(content: bytes) -> str:
    """What is wrong with the EXIF of a JPEG; empty if nothing."""
    exif = exif_block(content)
    if not exif:
        return ""
    try:
        orientation = read_orientation(exif)
    except Exception:  # whatever parsing junk may raise
        return "broken EXIF removed"
    return "" if orientation == 1 else f"EXIF with orientation {orientation} removed"
