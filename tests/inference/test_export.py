"""``syncbn export``: graphs and weights that compute what the network computes."""

import contextlib
import shutil
import sys
from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from torch import nn
from weights_of_noise import make_card, make_embedding_file, make_file, make_network, photos

from syncbn.cli import main
from syncbn.inference.export import Comparison
from syncbn.inference.graphs import GRAPHS, Onnx
from syncbn.models import inception_bn
from syncbn.models.weights import build_network, parse_card, read_weights, write_weights


@pytest.fixture(autouse=True)
def untouched_words(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["syncbn"])


def export(*words):
    main(["export", *map(str, words)])


def images(n, channels=3):
    return torch.randn(n, channels, 64, 64, generator=torch.Generator().manual_seed(3))


def outputs_of(network, given):
    with torch.no_grad():
        return network(given)


def test_onnx_under_onnxruntime(tmp_path, capsys):
    onnx = pytest.importorskip("onnx", reason="the extra syncbn[export] is not installed")
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra syncbn[export] is not installed")
    weights, network = make_file(tmp_path, "cadene")
    export(weights, "--output", tmp_path / "out.onnx")
    assert "69 BatchNorm layers folded" in capsys.readouterr().out
    nodes = {node.op_type for node in onnx.load(tmp_path / "out.onnx").graph.node}
    assert "Conv" in nodes and "BatchNormalization" not in nodes
    session = onnxruntime.InferenceSession(tmp_path / "out.onnx", providers=["CPUExecutionProvider"])
    for n in (1, 7):
        (actual,) = session.run(["logits"], {"images": images(n).numpy()})
        expected = outputs_of(network, images(n))
        assert (torch.from_numpy(actual) - expected).abs().max() < 1e-4 * max(1.0, expected.abs().max())
        assert torch.equal(torch.from_numpy(actual).argmax(1), expected.argmax(1))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors", "out.onnx", "out.onnx.card.json"]
    card = parse_card((tmp_path / "out.onnx.card.json").read_text(), "the card")
    assert card == read_weights(weights).card and card.preprocessing.colour_order == "BGR"


@pytest.mark.parametrize(
    ("words", "opset", "ir_version", "oldest"),
    [
        ([], 18, 8, "1.15"),
        (["--opset=19"], 19, 9, "1.16"),
        (["--opset=20"], 20, 9, "1.17"),
        (["--ir_version=10", "--opset=19"], 19, 10, "1.18"),
    ],
)
def test_onnx_is_written_for_old_runtimes(words, opset, ir_version, oldest, tmp_path, capsys):
    onnx = pytest.importorskip("onnx", reason="the extra syncbn[export] is not installed")
    weights, _ = make_file(tmp_path)
    export(weights, *words)
    assert f"runs under onnxruntime {oldest} and later" in capsys.readouterr().out
    model = onnx.load(tmp_path / "model.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert ([entry.version for entry in model.opset_import], model.ir_version) == ([opset], ir_version)
    notes = {entry.key: entry.value for entry in model.metadata_props}
    assert parse_card(notes["syncbn_model_card"], "the notes") == read_weights(weights).card
    assert "area averaging" in notes["pixels"] and "mean [123.675, 116.28, 103.53" in notes["pixels"]
    assert b"inception_bn.py" not in (tmp_path / "model.onnx").read_bytes(), "nothing of the machine it was made on"


def test_versions_of_onnx_that_are_not_written(tmp_path):
    with pytest.raises(ValueError, match="--opset 17 is not written: 18 to 23 are"):
        Onnx(opset=17)
    with pytest.raises(ValueError, match="--ir_version 8 does not go with --opset 19: 9 to 11 do"):
        Onnx(opset=19, ir_version=8)


def load_torchscript(path):
    return torch.jit.load(path)


def load_exported(path):
    return torch.export.load(path).module()


GRAPHS_OF_TORCH = {"torchscript": load_torchscript, "exported": load_exported}
SUFFIXES = {"torchscript": ".torchscript.pt", "exported": ".pt2"}


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("format", "fold"), [("torchscript", True), ("torchscript", False), ("exported", True)])
def test_torchs_own_graphs(format, fold, tmp_path, capsys):
    weights, network = make_file(tmp_path, "slim")
    export(weights, f"--format={format}", f"--fold={fold}", "--images", str(photos(1)[0].parent / "n020*"))
    output = capsys.readouterr().out
    assert f"68 BatchNorm layers {'folded' if fold else 'kept'}" in output and "top-1 classes agree" in output
    graph = GRAPHS_OF_TORCH[format](weights.with_suffix(SUFFIXES[format]))
    for n in (1, 5):
        assert (outputs_of(graph, images(n)) - outputs_of(network, images(n))).abs().max() < 1e-4


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("variant", ["paper", "cadene"])
def test_a_graph_that_takes_pixels(variant, tmp_path):
    weights, network = make_file(tmp_path, variant)
    export(weights, "--format=torchscript", "--preprocessing=true", "--output", tmp_path / "out.pt")
    path = photos(1)[0]
    rgb = cv2.resize(cv2.cvtColor(cv2.imread(str(path)), cv2.COLOR_BGR2RGB), (64, 64))
    by_hand = (
        rgb[:, :, ::-1] - np.array([104.0, 117.0, 128.0])
        if variant == "cadene"
        else (rgb / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    )
    expected = outputs_of(network, torch.from_numpy(by_hand.transpose(2, 0, 1).copy()).float()[None])
    actual = outputs_of(load_torchscript(tmp_path / "out.pt"), torch.from_numpy(rgb.transpose(2, 0, 1).copy())[None])
    assert (actual - expected).abs().max() < 1e-4 * max(1.0, expected.abs().max())
    card = parse_card((tmp_path / "out.pt.card.json").read_text(), "the card")
    assert (card.preprocessing.mean, card.preprocessing.std) == ((0.0,) * 3, (1.0,) * 3)


def test_an_export_beside_the_original_does_not_change_what_that_is_fed(tmp_path):
    weights, _ = make_file(tmp_path, "cadene")
    original = tmp_path / "bn.pth"
    export(weights, "--format=cadene", "--output", original)
    before = read_weights(original).card
    export(original, "--format=torchscript", "--preprocessing=true")
    assert read_weights(original).card == before


def test_a_folder_that_is_not_there_is_named(tmp_path, capsys):
    weights, _ = make_file(tmp_path, "paper")
    with pytest.raises(SystemExit):
        export(weights, "--format=cadene", "--output", tmp_path / "nowhere" / "a.pth")
    assert "there is no folder" in capsys.readouterr().err


KEEPING = [("cadene", "cadene", []), ("slim", "slim", []), ("paper", "safetensors", ["--fold=false"])]


@pytest.mark.parametrize(("variant", "format", "words"), KEEPING)
def test_weights_keep_every_bit(variant, format, words, tmp_path, capsys):
    weights, network = make_file(tmp_path, variant)
    output = tmp_path / "again" / {"cadene": "a.pth", "slim": "a.npz", "safetensors": "a.safetensors"}[format]
    output.parent.mkdir()
    export(weights, f"--format={format}", "--output", output, *words)
    assert "16 of 16 top-1 classes agree" in capsys.readouterr().out
    again = read_weights(output)
    assert again.layout.name == {"safetensors": "syncbn"}.get(format, format)
    assert again.card == read_weights(weights).card
    state = build_network(again).state_dict()
    assert all(
        torch.equal(state[name], tensor)
        for name, tensor in network.state_dict().items()
        if format != "slim" or "num_batches_tracked" not in name  # TensorFlow counts none
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_grey_network(tmp_path):
    network = make_network(in_channels=1)
    write_weights(network, make_card(network), tmp_path / "grey.safetensors", "safetensors")
    export(tmp_path / "grey.safetensors", "--format=torchscript")
    graph = load_torchscript(tmp_path / "grey.torchscript.pt")
    assert (outputs_of(graph, images(3, 1)) - outputs_of(network, images(3, 1))).abs().max() < 1e-4


@pytest.mark.parametrize(("variant", "norms"), [("paper", 69), ("cadene", 69), ("slim", 68)])
def test_safetensors_are_folded_and_load_like_any_weights(variant, norms, tmp_path, capsys):
    weights, network = make_file(tmp_path, variant)
    folded = tmp_path / "folded.safetensors"
    export(weights, "--format=safetensors", "--output", folded)
    assert f"{norms} BatchNorm layers folded" in capsys.readouterr().out
    content = read_weights(folded)
    assert not [name for name in content.tensors if ".bn." in name or "running" in name]
    again = inception_bn(weights=folded, num_classes=10).eval()
    assert not [layer for layer in again.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    expected = outputs_of(network, images(5))
    assert (outputs_of(again, images(5)) - expected).abs().max() < 1e-4 * max(1.0, expected.abs().max())
    before = read_weights(weights).card
    assert content.card == replace(before, architecture=before.architecture | {"norm": "none"})
    (path,) = photos(1)
    sys.argv[:] = ["syncbn"]
    with pytest.raises(SystemExit) as exited:
        main(["predict", str(folded), str(path), "--format=csv", "--top_k=1"])
    assert exited.value.code == 0 and ",name " in capsys.readouterr().out


def test_what_differs_from_position_to_position_is_not_folded(tmp_path, capsys):
    weights, _ = make_file(tmp_path, per_activation_head=64)
    with pytest.raises(SystemExit):
        export(weights, "--format=safetensors", "--output", tmp_path / "a.safetensors")
    assert "per_activation_head: its BatchNorm differs from position to position" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("format", ["onnx", "torchscript", "exported", "safetensors", "cadene"])
def test_an_embedding(format, tmp_path, capsys):
    weights, network = make_embedding_file(tmp_path)
    output = tmp_path / f"out.{format}"
    if format == "onnx":
        pytest.importorskip("onnxruntime", reason="the extra syncbn[export] is not installed")
    export(weights, f"--format={format}", "--output", output)
    text = capsys.readouterr().out
    assert "of numbers up to" in text and "top-1" not in text
    if format in GRAPHS_OF_TORCH:
        run = GRAPHS_OF_TORCH[format](output)
    elif format == "onnx":
        run = GRAPHS["onnx"].load(output)
        import onnx

        assert [given.name for given in onnx.load(output).graph.output] == ["embeddings"]
    else:
        run = build_network(read_weights(output))
    embedded = outputs_of(run, images(3))
    assert embedded.shape == (3, 6) and torch.allclose(embedded.norm(dim=1), torch.ones(3))
    assert (embedded - outputs_of(network, images(3))).abs().max() < 1e-5


def test_images_that_cannot_be_read_are_named(tmp_path, capsys):
    weights, _ = make_file(tmp_path)
    folder = tmp_path / "photos"
    folder.mkdir()
    shutil.copy(photos(1)[0], folder / "a.jpg")
    (folder / "b.jpg").write_bytes(b"no image")
    export(weights, "--format=safetensors", f"--images={folder}", "--output", tmp_path / "a.safetensors")
    out, err = capsys.readouterr()
    assert "compared on 1 images" in out
    assert f"left out of the comparison: cannot decode the image {folder}/b.jpg" in err
    (folder / "a.jpg").unlink()
    with pytest.raises(SystemExit):
        export(weights, "--format=safetensors", f"--images={folder}", "--output", tmp_path / "b.safetensors")
    assert "no image there can be read, such as: cannot decode" in capsys.readouterr().err


MISTAKES = {
    "a layout that cannot say it": (["--format=cadene"], "the layout cadene has separable_stem=False"),
    "a layout that has BatchNorm": (["--format=slim", "--fold=true"], "--fold true has no meaning"),
    "weights that take pixels": (["--format=slim", "--preprocessing=true"], "--preprocessing true has no meaning"),
    "an opset of no ONNX": (["--format=slim", "--opset=18"], "--opset 18 has no meaning with --format slim"),
    "the file itself": (["--format=safetensors"], "is the file of weights itself"),
    "images that are not there": (["--format=exported", "--images=nowhere"], "'nowhere' names no image"),
    "a format that does not exist": (["--format=caffe"], "format"),
}


@pytest.mark.parametrize(("words", "expected"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_answered_in_one_line_and_leaves_nothing(words, expected, tmp_path, capsys):
    weights, _ = make_file(tmp_path)
    with pytest.raises(SystemExit) as exited:
        export(weights, *words)
    errors = capsys.readouterr().err.strip().splitlines()
    assert exited.value.code == 1 and len(errors) == 1 and expected in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_what_differs_is_refused_and_removed(tmp_path, capsys, monkeypatch):
    weights, _ = make_file(tmp_path)
    monkeypatch.setattr("syncbn.inference.export.fold_batch_norm", lambda network: make_network(seed=1))
    with pytest.raises(SystemExit):
        export(weights, "--format=torchscript")
    assert "what was written does not compute what the original does" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_the_largest_difference_counts_however_large_the_logits_are():
    logits = torch.eye(3)
    for factor, change, refused in ((1, 5e-5, False), (1, 2e-4, True), (10, 5e-4, True), (1, float("nan"), True)):
        comparison = Comparison()
        comparison.add(logits, logits)
        comparison.add(factor * logits, factor * logits + change)
        assert comparison.images == 6
        with pytest.raises(ValueError, match="does not compute") if refused else contextlib.nullcontext():
            comparison.check()


def test_a_near_tie_is_counted_and_another_class_is_refused():
    first = torch.tensor([[1.0, 0.0, 0.5], [1.0, 1.0 - 2e-5, 0.0]])
    comparison = Comparison()
    comparison.add(first, first + torch.tensor([[0.0, 0.0, 0.0], [-1.5e-5, 1.5e-5, 0.0]]))
    comparison.check()
    assert (comparison.agreeing, comparison.ties) == (1, 1)
    assert comparison.widest_tie == pytest.approx(2e-5, rel=0.01)
    assert comparison.words().endswith(
        "1 of 2 top-1 classes agree, 1 near-ties of the original do not (its two logits at most 2e-05 apart)"
    )
    another = Comparison()
    another.add(first, first.flip(1))
    with pytest.raises(ValueError, match=r"an output differs by 1, allowed is less than 0.0001"):
        another.check()


def test_onnx_without_its_packages(tmp_path, capsys, monkeypatch):
    weights, _ = make_file(tmp_path)
    monkeypatch.setattr("syncbn.inference.graphs.find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        export(weights)
    assert "needs onnx, onnxscript, onnxruntime: pip install 'syncbn[export]'" in capsys.readouterr().err
