"""The size of a JPEG without decoding it; decoding at reduced scale; what EXIF says is ignored unless asked for."""

import cv2
import numpy as np
import pytest
from photos import ImagesInMemory, encode, noise, originals, smooth

from syncbn.data.datasets.decoding import DecodingError, decode
from syncbn.data.datasets.jpeg import jpeg_size

THUMBNAIL_AND_ORIENTATION = (
    b"\xff\xe1"
    + (2 + 32 + 22).to_bytes(2, "big")
    + b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    # The size of a thumbnail within the segment is not that of the image.
    + b"\xff\xd8\xff\xc0\0\x11\x08\0\x05\0\x07\x03\x01\x22\0\x02\x11\x01\x03\x11\x01\x00"
)


def with_exif(content: bytes) -> bytes:
    return content[:2] + THUMBNAIL_AND_ORIENTATION + content[2:]


def test_sizes_of_real_photos():
    photos = originals()
    for index in range(len(photos)):
        assert jpeg_size(photos.encoded(index)) == decode(photos.encoded(index)).shape[:2]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("progressive", [0, 1])
def test_size_of_a_jpeg(channels, progressive):
    flags = [cv2.IMWRITE_JPEG_PROGRESSIVE, progressive, cv2.IMWRITE_JPEG_RST_INTERVAL, 2]
    content = cv2.imencode(".jpg", noise(37, 61, channels), flags)[1].tobytes()
    assert jpeg_size(content) == (37, 61)
    assert jpeg_size(with_exif(content)) == (37, 61)
    assert jpeg_size(content[:2] + b"\xff\xff\xff" + content[2:]) == (37, 61)  # fill bytes before a marker


def test_no_size_where_there_is_no_usual_header():
    content = encode(noise(37, 61))
    assert jpeg_size(encode(noise(37, 61), ".png")) is None
    header = content.index(b"\xff\xc0")
    for length in range(header + 9):
        assert jpeg_size(content[:length]) is None
    assert jpeg_size(content[: header + 5] + b"\0\0" + content[header + 7 :]) is None
    for segment_length in (b"\0\0", b"\0\1"):
        assert jpeg_size(b"\xff\xd8\xff\xe0" + segment_length + bytes(20)) is None


def test_orientation_in_exif_is_ignored_unless_asked_for():
    content = with_exif(encode(smooth(40, 80)))
    turned = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_COLOR_RGB)
    assert turned.shape == (80, 40, 3), "the file's EXIF is meant to turn it"
    assert decode(content).shape == (40, 80, 3) and decode(content, reduction=2).shape == (20, 40, 3)
    assert np.array_equal(decode(content, exif_orientation=True), turned)
    assert decode(content, reduction=2, exif_orientation=True).shape == (40, 20, 3)


@pytest.mark.parametrize("reduction", [2, 4, 8])
@pytest.mark.parametrize("shape", [(64, 80), (65, 83), (1, 500), (7, 3)])
def test_reduced_decoding_is_averaging_blocks(reduction, shape):
    image = smooth(*shape)
    reduced = decode(encode(image), reduction=reduction)
    assert reduced.shape == (-(-shape[0] // reduction), -(-shape[1] // reduction), 3)
    height, width = (side // reduction * reduction for side in shape)
    blocks = image[:height, :width].reshape(height // reduction, reduction, width // reduction, reduction, 3)
    if blocks.size:
        whole = reduced[: height // reduction, : width // reduction]
        assert np.abs(whole - blocks.mean((1, 3))).mean() < 1.5


def test_grey_and_colour():
    content = encode(noise(16, 16, 1))
    assert decode(content, channels=1).shape == (16, 16, 1)
    colour = decode(content)
    assert colour.shape == (16, 16, 3) and (colour[:, :, :1] == colour).all()
    red = decode(encode(np.full((16, 16, 3), (250, 10, 20), np.uint8)))
    assert red.mean((0, 1)) == pytest.approx((250, 10, 20), abs=3)


def test_a_photo_is_decoded_or_named():
    image = noise(30, 40)
    photos = ImagesInMemory(encode(image, ".png"), encode(image), b"", encode(image)[:60])
    assert photos.photo(0).reductions == (1,) and np.array_equal(photos.photo(0).pixels(), image)
    assert photos.photo(1).reductions == (1, 2, 4, 8)
    assert (photos.photo(1).height, photos.photo(1).width) == (30, 40)
    for index in (2, 3):
        with pytest.raises(ValueError, match=f"image number {index}"):
            photos.photo(index).pixels()


def test_a_pointer_of_git_lfs_is_called_so():
    with pytest.raises(DecodingError, match="a pointer of Git LFS instead of the image: `git lfs pull` fetches it"):
        decode(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n")


@pytest.mark.parametrize("progressive", [0, 1])
def test_a_jpeg_that_was_cut_short_is_refused(progressive):
    content = cv2.imencode(".jpg", noise(64, 64), [cv2.IMWRITE_JPEG_PROGRESSIVE, progressive])[1].tobytes()
    thumbnail = b"\xff\xe1" + (2 + len(content)).to_bytes(2, "big") + content  # it has an end of its own
    assert decode(content + bytes(40)) is not None, "what follows the end does no harm"
    for whole in (content, content[:2] + thumbnail + content[2:]):
        assert decode(whole) is not None
        for share in (0.6, 0.9, 0.999):
            for reduction in (1, 4):
                with pytest.raises(DecodingError, match="the image file is truncated"):
                    decode(whole[: int(share * len(whole))], reduction=reduction)


def test_no_real_photo_is_taken_for_cut_short():
    photos = originals()
    for index in range(len(photos)):
        content = photos.encoded(index)
        assert decode(content, reduction=8) is not None
        with pytest.raises(DecodingError, match="truncated"):
            decode(content[: len(content) * 2 // 3], reduction=8)
