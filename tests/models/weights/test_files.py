"""Files that are no weights, or are made to harm: each is refused in one line that names it, and nothing of it runs."""

import dataclasses
import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from syncbn.models import inception_bn
from syncbn.models.weights import WeightsError, load_network, read_weights


@pytest.fixture(scope="module")
def state():
    return inception_bn(10, width_multiplier=0.125).state_dict()


def refusal(path):
    """What is said about a file, which must be one line that names it."""
    with pytest.raises(WeightsError) as raised:
        read_weights(path)
    text = str(raised.value)
    assert text.startswith(f"weights {path}: ") and "\n" not in text and len(text) < 500 + len(str(path))
    return text


class Bomb:
    """Unpickled by the plain unpickler, it leaves a file behind."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_checkpoint_does_not_run(state, zipped, tmp_path):
    path, mark = tmp_path / "evil.pth", tmp_path / "it-ran"
    torch.save({"state_dict": state, "note": Bomb(mark)}, path, _use_new_zipfile_serialization=zipped)
    assert "asks for the Python object posix.system" in refusal(path)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "the code in this file does run where it is allowed to"


def test_code_in_a_bare_pickle_or_an_npz_does_not_run(tmp_path):
    mark = tmp_path / "it-ran"
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Bomb(mark)))
    text = refusal(tmp_path / "evil.pkl")
    assert "a pickle that torch.save did not write" in text and "weights_only" not in text
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Bomb(mark), protocol=2))
    assert "asks for the Python object posix.system" in refusal(tmp_path / "evil.pkl")
    np.savez(tmp_path / "evil.npz", a=np.array([Bomb(mark)], dtype=object))
    assert "Python objects" in refusal(tmp_path / "evil.npz")
    assert not mark.exists()


def test_a_whole_module_is_refused_with_the_remedy(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    assert refusal(tmp_path / "module.pth").endswith("and only tensors are loaded: save a state_dict() instead")


@pytest.mark.parametrize("kind", ["torch", "legacy torch", "safetensors", "npz"])
@pytest.mark.parametrize("kept", [1, 20, 0.5, 0.999])
def test_truncated_files(state, kind, kept, tmp_path):
    path = tmp_path / "whole"
    if kind == "safetensors":
        from safetensors.torch import save_file

        save_file(state, path)
    elif kind == "npz":
        with path.open("wb") as file:
            np.savez(file, **{name: tensor.numpy() for name, tensor in state.items()})
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "torch")
    read_weights(path)
    content = path.read_bytes()
    path.write_bytes(content[: kept if kept > 1 or kept == 1 else int(len(content) * kept)])
    refusal(path)


@pytest.mark.parametrize("place", [0.2, 0.5, 0.9])
def test_a_damaged_npz(state, place, tmp_path):
    path = tmp_path / "whole.npz"
    np.savez_compressed(path, **{name: tensor.numpy() for name, tensor in state.items()})
    content = bytearray(path.read_bytes())
    middle = int(len(content) * place)
    content[middle : middle + 64] = bytes(64)
    path.write_bytes(content)
    refusal(path)


def test_what_is_no_file_of_weights(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "text.pth").write_text("these are no weights, but they are long enough to look at")
    (tmp_path / "pointer.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    )
    (tmp_path / "graph.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch" * 3)
    torch.save([1, 2, 3], tmp_path / "list.pth")
    torch.save({"state_dict": {}}, tmp_path / "nothing.pth")
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    np.savez(tmp_path / "words.npz", a=np.array(["a"]))
    expected = {
        "missing.pth": "there is no such file",
        ".": "it is a folder",
        "empty": "it is empty",
        "text.pth": "it is none of PyTorch's",
        "pointer.safetensors": "it is a pointer of Git LFS instead of the weights: `git lfs pull` fetches them",
        "graph.onnx": "it is a graph, which onnxruntime runs",
        "list.pth": "it holds a list",
        "nothing.pth": "its 0 tensors are of no known layout",
        "linear.pth": "of no known layout of Inception-BN (weight, bias ...)",
        "words.npz": "its 0 tensors are of no known layout",
    }
    for name, text in expected.items():
        assert text in refusal(tmp_path / name)


def test_a_zip_bomb_in_pytorchs_clothes(state, tmp_path):
    torch.save(state, tmp_path / "whole.pth")
    with zipfile.ZipFile(tmp_path / "whole.pth") as whole, zipfile.ZipFile(tmp_path / "bomb.pth", "w") as bomb:
        for member in whole.infolist():
            content = b"\0" * 10_000_000 if member.filename.endswith("/data/0") else whole.read(member)
            bomb.writestr(member.filename, content, zipfile.ZIP_DEFLATED)
    assert (tmp_path / "bomb.pth").stat().st_size < 2_000_000
    assert "compressed or overlap" in refusal(tmp_path / "bomb.pth")


def test_an_npz_that_would_fill_the_memory(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<f4", "fortran_order": False, "shape": (1 << 40,)})
    with zipfile.ZipFile(tmp_path / "promise.npz", "w") as archive:
        archive.writestr("a.npy", header.getvalue())
    assert "more than it holds" in refusal(tmp_path / "promise.npz")
    with (
        zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as archive,
        archive.open(zipfile.ZipInfo("a.npy"), "w", force_zip64=True) as file,
    ):
        file.write(header.getvalue())
    with zipfile.ZipFile(tmp_path / "bomb.npz") as archive:
        size = archive.getinfo("a.npy").file_size
    content = (tmp_path / "bomb.npz").read_bytes()
    central = content.rindex(b"PK\x01\x02")
    at = central + 24  # the uncompressed size in the central directory
    assert content[at : at + 4] == size.to_bytes(4, "little")
    (tmp_path / "bomb.npz").write_bytes(content[:at] + (0xF0000000).to_bytes(4, "little") + content[at + 4 :])
    assert "would take 3.8 GiB" in refusal(tmp_path / "bomb.npz")


def test_a_tensor_that_is_larger_than_the_file(state, tmp_path):
    huge = torch.zeros(1).expand(1 << 20, 1 << 20)
    torch.save(state | {"stem.conv2.conv.weight": huge}, tmp_path / "expanded.pth")
    assert "stem.conv2.conv.weight has the shape (1048576, 1048576) but fewer numbers" in refusal(
        tmp_path / "expanded.pth"
    )
    head = {"classifier.weight": torch.zeros(1, 1).expand(1 << 38, 152), "classifier.bias": torch.zeros(1 << 4)}
    torch.save(state | head, tmp_path / "wide_head.pth")  # of which nothing but its size would tell
    assert "classifier.weight has the shape (274877906944, 152) but fewer numbers" in refusal(
        tmp_path / "wide_head.pth"
    )


def test_a_storage_that_promises_more_than_the_file_has(state, tmp_path):
    torch.save(state, tmp_path / "whole.pth")
    numel = state["classifier.weight"].numel()
    pattern, replaced = b"M" + numel.to_bytes(2, "little"), 0
    with zipfile.ZipFile(tmp_path / "whole.pth") as whole, zipfile.ZipFile(tmp_path / "liar.pth", "w") as liar:
        for member in whole.infolist():
            content = whole.read(member)
            if member.filename.endswith("data.pkl"):
                replaced = content.count(pattern)
                content = content.replace(pattern, b"J" + (1 << 30).to_bytes(4, "little"))
            liar.writestr(member.filename, content)
    assert replaced
    assert "truncated, damaged or no checkpoint" in refusal(tmp_path / "liar.pth")


def test_sparse_and_integer_tensors(state, tmp_path):
    torch.save(state | {"classifier.weight": state["classifier.weight"].to_sparse()}, tmp_path / "sparse.pth")
    assert "classifier.weight is sparse" in refusal(tmp_path / "sparse.pth")
    torch.save(state | {"classifier.weight": torch.empty(10, 48, device="meta")}, tmp_path / "meta.pth")
    assert "classifier.weight is sparse, quantised or without data" in refusal(tmp_path / "meta.pth")
    torch.save(state | {"classifier.weight": state["classifier.weight"].long()}, tmp_path / "whole_numbers.pth")
    with pytest.raises(WeightsError, match=r"classifier.weight is torch.int64, not torch.float32"):
        inception_bn(10, weights=tmp_path / "whole_numbers.pth", width_multiplier=0.125)


def test_a_tensor_of_the_wrong_number_of_axes(tmp_path):
    np.savez(tmp_path / "a.npz", **{"InceptionV2/Conv2d_2b_1x1/weights": np.zeros((3, 3), np.float32)})
    assert "InceptionV2/Conv2d_2b_1x1/weights has the shape (3, 3)" in refusal(tmp_path / "a.npz")


def test_a_tensorflow_checkpoint_without_tensorflow(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tensorflow", None)
    monkeypatch.setitem(__import__("sys").modules, "tensorflow.train", None)
    Path(f"{tmp_path}/model.ckpt.index").touch()
    with pytest.raises(WeightsError, match=r"a TensorFlow checkpoint, which the package tensorflow reads: install it"):
        read_weights(tmp_path / "model.ckpt")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"architecture": {"width_multiplier": 1e6}}, "do not fit the network"),
        ({"architecture": {"width_multiplier": 1e7}}, "no network is so"),
        ({"architecture": {"width_multiplier": -1}}, "no network is so"),
        ({"architecture": {"wide": 1}}, "no network is so"),
        ({"num_classes": 10**9, "classes": None}, "its card is of 1000000000 classes, its classifier of 10"),
    ],
)
def test_a_card_that_lies(change, expected, state, tmp_path):
    torch.save(state, tmp_path / "a.pth")
    card = read_weights(tmp_path / "a.pth").card
    (tmp_path / "a.pth.card.json").write_text(dataclasses.replace(card, **change).to_json())
    with pytest.raises(WeightsError, match=expected) as raised:
        load_network(tmp_path / "a.pth")
    assert "\n" not in str(raised.value)
