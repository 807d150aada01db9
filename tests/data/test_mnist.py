"""MNIST's files: taken where they are, else downloaded from the first mirror with the right content."""

import functools
import gzip
import hashlib
import http.server
import os
import threading
from pathlib import Path

import numpy as np
import pytest

from syncbn.data.datasets import mnist
from syncbn.data.datasets.idx import IDX_FILES, read_idx

DATA = Path(os.environ.get("SYNCBN_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "mnist"


def idx(shape: tuple[int, ...], values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, len(shape)]) + np.array(shape, ">u4").tobytes() + values.astype(np.uint8).tobytes()


@pytest.fixture
def content(monkeypatch):
    """Four small files, which the checksums fit."""
    files = {}
    for (split, part), name in IDX_FILES.items():
        count = {"train": 30, "test": 20}[split]
        shape = (count, 4, 4) if part == "images" else (count,)
        files[name] = idx(shape, np.arange(int(np.prod(shape))) % 10)
    monkeypatch.setattr(mnist, "SHA256", {name: hashlib.sha256(file).hexdigest() for name, file in files.items()})
    return files


@pytest.fixture
def serve(tmp_path_factory):
    """Serves a folder over HTTP; returns its address."""
    servers = []

    def start(files: dict[str, bytes]) -> str:
        folder = tmp_path_factory.mktemp("mirror")
        for name, file in files.items():
            (folder / name).write_bytes(file)

        class Quiet(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def gzipped(content: dict[str, bytes], level: int = 9) -> dict[str, bytes]:
    return {f"{name}.gz": gzip.compress(file, level) for name, file in content.items()}


@pytest.mark.skipif(not DATA.is_dir(), reason=f"there is no {DATA}")
def test_the_checksums_are_those_of_mnist():
    for name, digest in mnist.SHA256.items():
        assert hashlib.sha256(gzip.decompress((DATA / f"{name}.gz").read_bytes())).hexdigest() == digest


def test_files_are_downloaded_whatever_their_compression(tmp_path, content, serve):
    folder = tmp_path / "new" / "mnist"
    mnist.fetch_mnist(folder, [serve(gzipped(content, level=1))])
    assert sorted(path.name for path in folder.iterdir()) == sorted(f"{name}.gz" for name in content)
    assert read_idx(folder / "train-images-idx3-ubyte.gz").shape == (30, 4, 4)


def test_what_is_there_is_not_downloaded(tmp_path, content):
    for place, (name, file) in enumerate(content.items()):
        if place % 2:
            (tmp_path / name).write_bytes(file)
        else:
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(file))
    mnist.fetch_mnist(tmp_path, mirrors=[])


def test_a_mirror_without_the_file_or_with_another_is_passed_over(tmp_path, content, serve):
    broken = {name: file[: len(file) // 2] for name, file in gzipped(content).items()}
    other = gzipped({name: file + b"\0" for name, file in content.items()})
    page = dict.fromkeys(gzipped(content), b"<html>please log in</html>")
    mirrors = [serve({}), serve(broken), serve(other), serve(page), serve(gzipped(content))]
    mnist.fetch_mnist(tmp_path, mirrors)
    assert gzip.decompress((tmp_path / "t10k-labels-idx1-ubyte.gz").read_bytes()) == content["t10k-labels-idx1-ubyte"]


def test_without_a_good_mirror_every_failure_is_told_and_nothing_is_left(tmp_path, content, serve):
    other = serve(gzipped({name: file + b"\0" for name, file in content.items()}))
    mirrors = [serve({}), other, "http://127.0.0.1:9"]
    with pytest.raises(ValueError) as raised:
        mnist.fetch_mnist(tmp_path, mirrors)
    message = str(raised.value)
    assert "cannot download MNIST's train-images-idx3-ubyte.gz: put the four files into" in message
    assert "404" in message and f"{other}: the content has SHA-256" in message and "refused" in message
    assert not list(tmp_path.iterdir())


def test_a_file_in_place_of_the_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="file is a file: name the folder that holds MNIST's four files"):
        mnist.fetch_mnist(tmp_path / "file")


def test_a_cut_off_download_is_no_file(tmp_path, content, monkeypatch):
    def interrupted(url: str, path: str) -> None:
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(mnist.torch.hub, "download_url_to_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mnist.fetch_mnist(tmp_path, ["http://127.0.0.1:9"])
    assert not list(tmp_path.iterdir())


def test_the_default_folder_is_in_the_users_cache(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert mnist.default_folder() == Path("/caches/syncbn/mnist")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert mnist.default_folder() == Path("~/.cache/syncbn/mnist").expanduser()
