"""What the segments before a JPEG's pixels say: size, components, EXIF. Source: ITU-T T.81, annex B."""

import struct
from collections.abc import Iterator
from typing import NamedTuple

START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
"""Markers before a frame header (table B.1)."""

START_OF_SCAN, APP1 = 0xDA, 0xE1

END_OF_IMAGE = b"\xff\xd9"

WITHOUT_LENGTH = frozenset({0x01, *range(0xD0, 0xDA)})
"""Markers that stand alone (table B.1)."""

EXIF = b"Exif\0\0"


class Segment(NamedTuple):
    """A marker and what belongs to it.

    Attributes:
        marker: Its second byte.
        begin: Where in the file the marker begins.
        end: Where the next marker begins, by the length that the segment names.
    """

    marker: int
    begin: int
    end: int


class Frame(NamedTuple):
    """What a frame header says.

    Attributes:
        place: Where in the file its marker begins.
        bits: Of a sample; 8 in what is usually meant by JPEG.
        height: In pixels.
        width: In pixels.
        components: 1 of grey images, 3 of colours, 4 of CMYK.
    """

    place: int
    bits: int
    height: int
    width: int
    components: int


def segments(content: bytes) -> Iterator[Segment]:
    """The segments of a JPEG up to the first scan; nothing of other bytes, and no more where they are damaged."""
    place = 2 if content[:2] == b"\xff\xd8" else len(content)
    while place + 4 <= len(content) and content[place] == 0xFF:
        marker = content[place + 1]
        if marker == 0xFF:  # a fill byte
            place += 1
            continue
        alone = marker in WITHOUT_LENGTH
        end = place + 2 + (0 if alone else int.from_bytes(content[place + 2 : place + 4], "big"))
        yield Segment(marker, place, end)
        if marker == START_OF_SCAN:
            return
        place = end


def find_frame(content: bytes) -> Frame | None:
    """The frame header of a JPEG; None where there is none."""
    for segment in segments(content):
        if segment.marker in START_OF_FRAME and segment.begin + 10 <= len(content):
            return Frame(segment.begin, *struct.unpack_from(">BHHB", content, segment.begin + 4))
    return None


def jpeg_size(content: bytes) -> tuple[int, int] | None:
    """Height and width that a JPEG's frame header names.

    Args:
        content: Any bytes.

    Returns:
        (height, width), or None where the bytes are no JPEG or its header is unusual: decode to know.
    """
    frame = find_frame(content)
    return (frame.height, frame.width) if frame and frame.height and frame.width else None


def is_cut_short(content: bytes) -> bool:
    """Whether a JPEG lacks its end: OpenCV makes the missing part grey, and only warns.

    The end marker is looked for behind the frame header, since a thumbnail before it has one of its own.
    """
    frame = find_frame(content)
    return frame is not None and content.rfind(END_OF_IMAGE, frame.place) < 0


def exif_of(content: bytes) -> bytes:
    """The content of a JPEG's first EXIF segment; empty where there is none."""
    for segment in segments(content):
        if segment.marker in START_OF_FRAME:
            break
        if _holds_exif(content, segment):
            return content[segment.begin + 4 : segment.end]
    return b""


def without_exif(content: bytes) -> bytes:
    """A JPEG without its EXIF segments; the pixels stay exactly as they are."""
    dropped = [segment for segment in segments(content) if _holds_exif(content, segment)]
    kept, place = [], 0
    for segment in dropped:
        kept.append(content[place : segment.begin])
        place = segment.end
    return b"".join([*kept, content[place:]])


def _holds_exif(content: bytes, segment: Segment) -> bool:
    return segment.marker == APP1 and content.startswith(EXIF, segment.begin + 4)
