"""Encoded images: their size without decoding, and their pixels at full or reduced scale.

The decoder is OpenCV's. It ignores EXIF's orientation, as readers of ImageNet do.
"""

import struct

import cv2
import numpy as np

REDUCTIONS = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
"""Factors by which a JPEG's decoder can shrink at no cost, with OpenCV's flags (the colours are a flag apart)."""

START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""JPEG's markers before a frame header (ITU-T T.81, table B.1)."""

END_OF_IMAGE = b"\xff\xd9"

WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xDA)})
"""JPEG's markers that stand alone (the same table)."""


def jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Height and width that a JPEG's frame header names.

    Args:
        content: Any bytes.

    Returns:
        (height, width), or None where the bytes are no JPEG or its header is unusual: decode to know.
    """
    frame = _frame_header(content)
    if frame is None:
        return None
    height, width = struct.unpack_from(">HH", content, frame + 5)
    return (height, width) if height and width else None


def _frame_header(content: bytes) -> int | None:
    """Where a JPEG's frame header begins; None where there is none."""
    if content[:2] != b"\xff\xd8":
        return None
    place = 2
    while place + 9 <= len(content) and content[place] == 0xFF:
        marker = content[place + 1]
        if marker in START_OF_FRAME:
            return place
        if marker == 0xFF:  # a fill byte
            place += 1
        elif marker in WITHOUT_LENGTH:
            place += 2
        else:
            place += 2 + int.from_bytes(content[place + 2 : place + 4], "big")
    return None


def is_cut_short(content: bytes) -> bool:
    """Whether a JPEG lacks its end: OpenCV makes the missing part grey, and only warns.

    The end marker is looked for behind the frame header, since a thumbnail before it has one of its own.
    """
    frame = _frame_header(content)
    return frame is not None and content.rfind(END_OF_IMAGE, frame) < 0


def decode(content: bytes, channels: int = 3, reduction: int = 1) -> np.ndarray | None:
    """Decode an image.

    Args:
        content: A file of any format that OpenCV reads.
        channels: 3 for RGB, 1 for grey.
        reduction: 1, 2, 4 or 8: how many pixels in each direction become one. A JPEG's decoder does it
            by leaving out frequencies, which saves most of the decoding.

    Returns:
        uint8, shape (ceil(H / reduction), ceil(W / reduction), channels) of a JPEG; None for broken bytes, and for
        a JPEG that was cut short.
    """
    if is_cut_short(content):
        return None
    colours = cv2.IMREAD_COLOR_RGB if channels == 3 else cv2.IMREAD_GRAYSCALE
    flags = colours | cv2.IMREAD_IGNORE_ORIENTATION | REDUCTIONS[reduction]
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), flags) if content else None
    except cv2.error:  # of a header that names an impossible size
        return None
    return None if image is None else image.reshape(*image.shape[:2], channels)
