"""One image: decoded in full, repaired where needed, made smaller where asked for.

Pillow does all of it, though training decodes with OpenCV, which is faster: whether OpenCV takes a file that ends early
for whole depends on its version and on where it reads from, while Pillow always raises, and says why. Pillow
also neither rotates nor touches what it is not asked to, and what it can decode is what ImageNet's users have always
trained on. Damage in the middle of the data, which decoders gloss over, is not noticed.
"""

import io
import warnings

from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base as ExifTag

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF")
"""What is decoded, under whatever name; Pillow's rarer formats are not worth the attack surface."""

GREY_MODES = ("1", "L", "LA")
COLOUR_MODES = ("RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr")

START_OF_SCAN, APP1 = 0xDA, 0xE1


class UnusableImage(Exception):
    """An image that cannot be kept; the message is the reason."""


def convert_image(content: bytes, shorter_side: int | None, quality: int) -> tuple[bytes, str]:
    """Check an image and make of it a JPEG that every reader decodes to the same pixels.

    The bytes of a healthy JPEG are returned as they are, unless it is made smaller. EXIF that is broken, or that
    asks for a rotation, is cut out: ImageNet's labels and accuracies are about the pixels as stored, and readers
    differ in whether they rotate.

    Args:
        content: Of the file.
        shorter_side: In pixels, of what is returned; a smaller image, and any where this is None, keeps its size.
        quality: Of JPEG, 1 to 100, where the image is encoded again.

    Returns:
        The bytes of a JPEG, grey or RGB, and what was repaired (empty if nothing).

    Raises:
        UnusableImage: It cannot be decoded to its end.
    """
    if not content:
        raise UnusableImage("empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about EXIF, which is looked at below
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                image.load()
                return _convert_decoded(content, image, shorter_side, quality)
    except UnidentifiedImageError:
        raise UnusableImage(f"no image of a known format (it begins with {content[:8].hex()})") from None
    except Exception as error:  # whatever a decoder raises on bad data
        raise UnusableImage(f"cannot be decoded: {error}") from error


def _convert_decoded(content: bytes, image: Image.Image, shorter_side: int | None, quality: int) -> tuple[bytes, str]:
    """The same for an image that could be decoded."""
    repairs = []
    if image.format not in ("JPEG", "MPO"):  # MPO is a JPEG that further pictures follow
        repairs.append(f"{image.format} to JPEG")
    elif image.mode not in ("L", "RGB"):
        repairs.append(f"{image.mode} to RGB")
    if shorter_side is not None and min(image.size) > shorter_side:
        smaller = _resize(_to_jpeg_mode(image), shorter_side)
        return _encode(smaller, quality), ", ".join(repairs)
    if repairs:
        return _encode(_to_jpeg_mode(image), quality), ", ".join(repairs)
    flaw = _exif_flaw(image)
    return (_without_exif(content), flaw) if flaw else (content, "")


def _to_jpeg_mode(image: Image.Image) -> Image.Image:
    """The pixels as 8-bit grey or RGB; transparency is left out."""
    if image.mode in GREY_MODES:
        return image.convert("L")
    if image.mode in COLOUR_MODES:
        return image.convert("RGB")
    raise UnusableImage(f"its pixels are of the kind {image.mode!r}, of more than 8 bits")


def _resize(image: Image.Image, shorter_side: int) -> Image.Image:
    """The image with its shorter side as given, low-pass filtered (Pillow's filters widen as they shrink)."""
    scale = shorter_side / min(image.size)
    width, height = (round(side * scale) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _encode(image: Image.Image, quality: int) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return file.getvalue()


def _exif_flaw(image: Image.Image) -> str:
    """What is wrong with the EXIF of an image; empty if nothing."""
    if "exif" not in image.info:
        return ""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            exif = Image.Exif()  # not image.getexif(): what that could not parse the first time it takes for empty
            exif.load(image.info["exif"])
            orientation = exif.get(ExifTag.Orientation, 1)
        except Exception:  # whatever parsing junk may raise
            return "broken EXIF removed"
    return "" if orientation == 1 else f"EXIF with orientation {orientation} removed"


def _without_exif(content: bytes) -> bytes:
    """A JPEG file without its EXIF segments; the pixels stay exactly as they are."""
    kept = [content[:2]]
    position = 2
    while content[position] == 0xFF and content[position + 1] != START_OF_SCAN:
        marker = content[position + 1]
        if marker == 0xFF:  # a byte of padding before a marker
            position += 1
            continue
        end = position + 2 + int.from_bytes(content[position + 2 : position + 4], "big")
        if not (marker == APP1 and content[position + 4 : position + 8] == b"Exif"):
            kept.append(content[position:end])
        position = end
    kept.append(content[position:])
    return b"".join(kept)
