"""One image: kept as it is, repaired or refused."""

import io

import cv2
import numpy as np
import pytest
from PIL import Image

from imagenet_archives import encode, photo
from syncbn.data.preparation.conversion import UnusableImage, convert_image

BROKEN_EXIF = b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\x99" * 40


def convert(content, shorter_side=None, quality=95):
    return convert_image(content, shorter_side, quality)


def pixels(content):
    """As Pillow decodes them, which does not rotate."""
    return np.asarray(Image.open(io.BytesIO(content)))


def with_segment(content, data, marker=0xE1):
    return content[:2] + bytes([0xFF, marker]) + (len(data) + 2).to_bytes(2, "big") + data + content[2:]


def with_orientation(image, orientation):
    exif = Image.Exif()
    exif[0x112] = orientation
    return encode(image, exif=exif)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"quality": 30}, {"subsampling": 0}])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_healthy_bytes_stay(mode, options):
    content = encode(photo(mode=mode), **options)
    assert convert(content) == (content, "")


def test_healthy_exif_stays():
    content = with_orientation(photo(), 1)
    assert b"Exif" in content
    assert convert(content) == (content, "")


@pytest.mark.parametrize("progressive", [False, True])
def test_truncated_anywhere(progressive):
    content = encode(photo(width=200, height=150), progressive=progressive)
    for length in [*range(1, len(content), 97), len(content) - 10, len(content) - 2]:
        with pytest.raises(UnusableImage, match=r"truncated|Truncated|cannot be decoded|no image of a known format"):
            convert(content[:length])


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("damage", [b"\x55" * 50, b"\xff\x00" * 25, b"\xff\xd3", b"\xff\xd9", b"\xff\xda", b""])
def test_training_can_decode_what_is_kept(progressive, damage):
    original = encode(photo(width=300, height=200), progressive=progressive)
    kept = 0
    for at in range(20, len(original), 61):
        try:
            content, _ = convert(original[:at] + damage + original[at + len(damage) :])
        except UnusableImage:
            continue
        kept += 1
        decoded = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR)
        assert decoded is not None, at
        assert decoded.shape[:2] == pixels(content).shape[:2]
    assert kept


def test_truncated_names_the_reason():
    content = encode(photo(width=200, height=150))
    with pytest.raises(UnusableImage, match="image file is truncated"):
        convert(content[: len(content) // 2])


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"<html>404</html>", "no image of a known format"),
        (bytes(1000), "no image of a known format"),
        (encode(photo(), "PNG")[:-200], "cannot be decoded"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no image of a known format"),
    ],
)
def test_unusable(content, reason):
    with pytest.raises(UnusableImage, match=reason):
        convert(content)


def test_cmyk():
    original = photo(mode="CMYK")
    content, repair = convert(encode(original, quality=95))
    assert repair == "CMYK to RGB"
    assert pixels(content).shape == (40, 48, 3)
    assert np.abs(pixels(content).astype(int) - np.asarray(photo())).mean() < 6


@pytest.mark.parametrize(
    ("kind", "mode", "shape"),
    [
        ("PNG", "RGB", (40, 48, 3)),
        ("PNG", "RGBA", (40, 48, 3)),
        ("PNG", "L", (40, 48)),
        ("PNG", "1", (40, 48)),
        ("PNG", "P", (40, 48, 3)),
        ("GIF", "P", (40, 48, 3)),
        ("BMP", "RGB", (40, 48, 3)),
        ("WEBP", "RGB", (40, 48, 3)),
        ("TIFF", "CMYK", (40, 48, 3)),
    ],
)
def test_other_formats_become_jpeg(kind, mode, shape):
    content, repair = convert(encode(photo(mode=mode), kind))
    assert repair == f"{kind} to JPEG"
    assert Image.open(io.BytesIO(content)).format == "JPEG"
    assert pixels(content).shape == shape
    if mode == "RGB":
        assert np.abs(pixels(content).astype(int) - np.asarray(photo())).mean() < 6


@pytest.mark.parametrize("exif", [BROKEN_EXIF, b"Exif\0\0junk"])
def test_broken_exif_is_removed(exif):
    healthy = encode(photo())
    content, repair = convert(with_segment(healthy, exif))
    assert content == healthy
    assert repair.startswith("broken EXIF removed")


def test_orientation_is_removed_and_pixels_stay():
    """Readers differ in whether they rotate: OpenCV does, Pillow does not."""
    original = with_orientation(photo(), 6)
    content, repair = convert(original)
    assert repair == "EXIF with orientation 6 removed"
    assert np.array_equal(pixels(content), pixels(original))
    rotated, kept = (cv2.imdecode(np.frombuffer(c, np.uint8), cv2.IMREAD_COLOR_RGB) for c in (original, content))
    assert rotated.shape == (48, 40, 3)
    assert kept.shape == (40, 48, 3)


def test_other_segments_stay_when_exif_goes():
    comment = with_segment(encode(photo()), b"a comment", marker=0xFE)
    xmp = with_segment(comment, b"http://ns.adobe.com/xap/1.0/\0<x/>")
    padded = xmp[:2] + b"\xff" + xmp[2:]  # markers may have 0xFF before them
    content, _ = convert(with_segment(padded, BROKEN_EXIF))
    assert content in (padded, xmp)
    assert np.array_equal(pixels(content), pixels(padded))


@pytest.mark.parametrize(("width", "height", "wanted"), [(100, 60, (53, 32)), (60, 100, (32, 53)), (64, 64, (32, 32))])
def test_resize(width, height, wanted):
    content, repair = convert(encode(photo(width=width, height=height)), shorter_side=32)
    assert repair == ""
    assert Image.open(io.BytesIO(content)).size == wanted
    reference = photo(width=width, height=height).resize(wanted, Image.Resampling.BOX)
    assert np.abs(pixels(content).astype(int) - np.asarray(reference)).mean() < 6


def test_resize_keeps_grey_and_leaves_small_ones():
    content, _ = convert(encode(photo(mode="L")), shorter_side=32)
    assert pixels(content).shape == (32, 38)
    small = encode(photo(width=40, height=32))
    assert convert(small, shorter_side=32) == (small, "")


def test_quality():
    content = encode(photo(width=200, height=200), "PNG")
    assert len(convert(content, quality=30)[0]) < len(convert(content, quality=95)[0])
