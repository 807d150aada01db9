"""Every kind of image file: training, prediction and preparation make the same pixels of it, or all refuse it."""

import io
import warnings

import cv2
import numpy as np
import pytest
from photos import ImagesInMemory, smooth
from PIL import Image

from syncbn.data import ImageFolderDataset
from syncbn.data.datasets.decoding import DarkPixelsWarning, DecodingError, decode
from syncbn.data.preparation.conversion import UnusableImage, convert_image

PHOTO = Image.fromarray(smooth(32, 48))  # red rises to the right, green downwards
SEE_THROUGH = Image.fromarray(np.dstack([smooth(32, 48), np.full((32, 48), 100, np.uint8)]))
LAB = PHOTO.convert("LAB")
LEVELS = np.linspace(0, 4095, 32 * 48).reshape(32, 48).astype(np.uint16)  # 12 bits


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(kind, orientation=6, **options):
    exif = Image.Exif()
    exif[0x112] = orientation
    return saved(PHOTO, kind, exif=exif, **options)


def grey_tiff(pixels, bits, extra=()):
    """A TIFF of one strip of 16-bit numbers, little-endian, or of packed ones; ``extra`` are tags with their values."""
    if bits == 12:
        pairs = pixels.reshape(-1, 2).astype(np.uint32)
        packed = pairs[:, 0] << 12 | pairs[:, 1]
        strip = np.stack([packed >> 16, packed >> 8, packed], 1).astype(np.uint8).tobytes()
    else:
        strip = pixels.astype(f"<u{bits // 8}").tobytes()
    height, width = pixels.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: height, 279: len(strip)}
    entries = sorted((tags | dict(extra)).items())
    table = b"".join(
        np.array([tag, 4], "<u2").tobytes() + np.array([1, value], "<u4").tobytes() for tag, value in entries
    )
    start = np.array([8 + len(strip)], "<u4").tobytes()
    return b"II*\0" + start + strip + len(entries).to_bytes(2, "little") + table + bytes(4)


KINDS = {
    "JPEG": saved(PHOTO, "JPEG", quality=95),
    "PNG": saved(PHOTO, "PNG"),
    "PNG, see-through": saved(SEE_THROUGH, "PNG"),
    "PNG, 16 bits": cv2.imencode(".png", smooth(32, 48)[:, :, ::-1].astype(np.uint16) * 257)[1].tobytes(),
    "BMP": saved(PHOTO, "BMP"),
    "WebP, see-through": saved(SEE_THROUGH, "WEBP", lossless=True),
    "GIF": saved(PHOTO.quantize(256), "GIF"),
    "TIFF": saved(PHOTO, "TIFF"),
    "TIFF, see-through": saved(SEE_THROUGH, "TIFF"),
    "TIFF, LAB": saved(LAB, "TIFF"),
    "TIFF, 16 bits": cv2.imencode(".tiff", smooth(32, 48)[:, :, ::-1].astype(np.uint16) * 257)[1].tobytes(),
    "AVIF": saved(PHOTO, "AVIF", quality=95),
    "AVIF, see-through": saved(SEE_THROUGH, "AVIF", quality=95),
    "JPEG 2000": saved(PHOTO, "JPEG2000"),
}


def both_ways(content, exif_orientation=False):
    """The pixels that training and prediction see, and those of the JPEG that preparation makes."""
    dataset = ImagesInMemory(content)
    dataset.exif_orientation = exif_orientation
    prepared = convert_image(content, None, 100, exif_orientation)[0]
    return dataset.photo().pixels().astype(int), decode(prepared).astype(int)


@pytest.mark.parametrize("content", KINDS.values(), ids=KINDS.keys())
def test_training_and_preparation_see_the_same(content):
    seen, prepared = both_ways(content)
    assert seen.shape == prepared.shape == (32, 48, 3)
    assert np.abs(seen - smooth(32, 48)).mean() < 9, "the picture that was saved, red and blue in their places"
    assert np.abs(seen - prepared).mean() < 3  # JPEG halves the resolution of colours


@pytest.mark.parametrize("exif_orientation", [False, True])
@pytest.mark.parametrize(
    ("kind", "options"),
    [("JPEG", {"quality": 95}), ("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("AVIF", {"quality": 95})],
)
def test_orientation_is_the_switchs_in_exif_and_the_formats_own_in_others(kind, options, exif_orientation):
    upright = kind in ("TIFF", "AVIF") or exif_orientation
    for orientation in (3, 6, 8):
        turns = {3: 2, 6: 3, 8: 1}[orientation]  # by 90 degrees, to the left
        expected = np.rot90(smooth(32, 48), turns if upright else 0)
        seen, prepared = both_ways(turned(kind, orientation, **options), exif_orientation)
        assert seen.shape == prepared.shape == expected.shape
        assert np.abs(seen - expected).mean() < 9 and np.abs(seen - prepared).mean() < 3


def test_a_photo_that_is_turned_has_the_size_of_what_is_seen():
    dataset = ImagesInMemory(turned("JPEG"))
    assert (dataset.photo().height, dataset.photo().width, dataset.photo().is_plain_jpeg) == (32, 48, True)
    dataset.exif_orientation = True
    photo = dataset.photo()
    assert (photo.height, photo.width, photo.is_plain_jpeg) == (48, 32, False)
    assert photo.pixels(2).shape == (24, 16, 3)


DEEP = {
    "16 bits, scaled": (grey_tiff(LEVELS * 16, 16), LEVELS >> 4),
    "12 bits, packed": (grey_tiff(LEVELS, 12), LEVELS >> 4),
    "12 of 16 bits, as a tag says": (grey_tiff(LEVELS, 16, {281: 4095}.items()), LEVELS >> 4),
    "white is 0": (grey_tiff(65535 - LEVELS * 16, 16, {262: 0}.items()), LEVELS >> 4),
}


@pytest.mark.parametrize(("content", "expected"), DEEP.values(), ids=DEEP.keys())
def test_deep_pixels_are_scaled_by_what_the_file_says(content, expected):
    seen, prepared = both_ways(content)
    assert np.abs(seen - expected[..., None]).max() <= 1 and np.abs(prepared - expected[..., None]).max() <= 3


@pytest.mark.parametrize(
    "content", [cv2.imencode(".png", LEVELS)[1].tobytes(), grey_tiff(LEVELS, 16)], ids=["PNG", "TIFF"]
)
def test_deep_pixels_of_which_the_file_says_nothing_are_warned_of(content):
    with pytest.warns(DarkPixelsWarning, match="no number above 4095"):
        decode(content)
    assert "nearly black: its 16 bits may hold 12" in convert_image(content, None, 95)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(cv2.imencode(".png", LEVELS * 16)[1].tobytes())


REFUSED = {
    "floating-point": (saved(Image.new("F", (8, 8)), "TIFF"), "floating-point numbers, whose range it does not say"),
    "32 bits": (saved(Image.new("I", (8, 8)), "TIFF"), "numbers, whose range it does not say"),
    "PPM, by a decoder that is not opened": (saved(PHOTO, "PPM"), "no image of a known format"),
}


@pytest.mark.parametrize(("content", "reason"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_refused_is_refused_by_all_for_the_same_reason(content, reason):
    with pytest.raises(DecodingError, match=reason):
        decode(content)
    with pytest.raises(UnusableImage, match=reason):
        convert_image(content, None, 95)


def test_the_kind_is_told_by_the_content(tmp_path):
    for name, kind in (("a", "AVIF"), ("b", "JPEG 2000"), ("b", "GIF")):
        path = tmp_path / name / f"{kind}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(KINDS[kind])
    dataset = ImageFolderDataset(tmp_path)
    for index in range(3):
        assert np.abs(dataset.image(index).astype(int) - smooth(32, 48)).mean() < 9
