"""Finding members by headers alone, in sound and in damaged archives."""

import io
import tarfile

import pytest

from imagenet_archives import tar
from syncbn.data.preparation.archives import scan_archive

FILES = [(f"image_{number}.JPEG", bytes([number]) * (400 + 300 * number)) for number in range(5)]
NAMES = [name for name, _ in FILES]


def scan(tmp_path, content, *place):
    path = tmp_path / "a.tar"
    path.write_bytes(content)
    members, damages = scan_archive(path, *place)
    for member in members:
        if member.whole:
            assert content[member.offset : member.offset + member.size] == dict(FILES)[member.name]
    return [member.name for member in members if member.whole], damages


def header_of(content, name):
    return content.index(name.encode())


def test_sound(tmp_path):
    assert scan(tmp_path, tar(FILES)) == (NAMES, [])
    assert scan(tmp_path, tar([])) == ([], [])


def test_an_archive_within_an_archive(tmp_path):
    outer = tar([("a.tar", tar(FILES[:2])), ("b.tar", tar(FILES[2:])), ("c.tar", tar([]))])
    path = tmp_path / "outer.tar"
    path.write_bytes(outer)
    inner, damages = scan_archive(path)
    assert ([member.name for member in inner], damages) == (["a.tar", "b.tar", "c.tar"], [])
    places = [(member.offset, member.offset + member.size) for member in inner]
    assert [scan(tmp_path, outer, *place) for place in places] == [(NAMES[:2], []), (NAMES[2:], []), ([], [])]


def test_long_names_and_folders(tmp_path):
    file = io.BytesIO()
    for form in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as archive:
            folder = tarfile.TarInfo("folder")
            folder.type = tarfile.DIRTYPE
            archive.addfile(folder)
            member = tarfile.TarInfo("folder/" + "é" * 150)
            member.size = 3
            archive.addfile(member, io.BytesIO(b"abc"))
        path = tmp_path / "a.tar"
        path.write_bytes(file.getvalue())
        members, damages = scan_archive(path)
        assert ([member.name for member in members], damages) == (["folder/" + "é" * 150], [])


@pytest.mark.parametrize("lost", range(5))
def test_a_damaged_header_costs_one_member(tmp_path, lost):
    content = bytearray(tar(FILES))
    at = header_of(content, NAMES[lost])
    content[at + 100 : at + 400] = b"\xaa" * 300
    names, damages = scan(tmp_path, bytes(content))
    assert names == NAMES[:lost] + NAMES[lost + 1 :]
    assert len(damages) == 1
    assert (f"after {NAMES[lost - 1]}" if lost else "at the beginning") in damages[0]


def test_cut_off_within_a_member(tmp_path):
    content = tar(FILES)
    names, damages = scan(tmp_path, content[: header_of(content, NAMES[3]) + 512 + 100])
    assert names == NAMES[:3]
    assert damages == [f"the archive ends within {NAMES[3]}"]


@pytest.mark.parametrize("into_header", [0, 200])
def test_cut_off_at_a_header(tmp_path, into_header):
    content = tar(FILES)
    names, damages = scan(tmp_path, content[: header_of(content, NAMES[3]) + into_header])
    assert names == NAMES[:3]
    assert damages == [f"the archive breaks off after {NAMES[2]}"]


@pytest.mark.parametrize("content", [b"", b"\xff" * 5000, b"short", b"<html>" * 400])
def test_no_archive_at_all(tmp_path, content):
    names, damages = scan(tmp_path, content)
    assert names == []
    assert len(damages) == 1
    assert "at the beginning" in damages[0]


def test_garbage_within_an_archive_does_not_spill(tmp_path):
    """The search for a sound header ends where the inner archive does."""
    outer = tar([("a.tar", b"\xaa" * 4096), ("b.tar", tar(FILES))])
    path = tmp_path / "outer.tar"
    path.write_bytes(outer)
    (first, second), damages = scan_archive(path)
    assert damages == []
    names, damages = scan(tmp_path, outer, first.offset, first.offset + first.size)
    assert names == []
    assert damages == ["the archive breaks off at the beginning"]
    assert scan(tmp_path, outer, second.offset, second.offset + second.size) == (NAMES, [])
