"""Every verb that takes a checkpoint and data compares the names of their classes."""

import csv
import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from syncbn.cli import main
from syncbn.models.weights import CARD_KEY
from syncbn.training.checkpoints.trained_classes import classes_of

pytestmark = [
    pytest.mark.usefixtures("own_folder"),
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]

FRUIT = ("apple", "banana", "cherry")
COLOURS = ((30, 30, 220), (40, 220, 230), (150, 20, 120))
TRAINER = ("--trainer.devices=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false")
WORDS = (
    *TRAINER,
    *("--model.stem=small", "--model.width_multiplier=0.0625", "--model.learning_rate_per_32_images=0.2"),
    *("--global_batch_size=8", "--data.image_size=16", "--test_after_fit=false", "--trainer.log_every_n_steps=1"),
)


def make_photos(folder, names=FRUIT, colours=COLOURS):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, colour in zip(names, colours, strict=True):
            (folder / split / name).mkdir(parents=True)
            for number in range(8):
                pixels = np.clip(colour + rng.normal(0, 15, (16, 16, 3)), 0, 255).astype(np.uint8)
                cv2.imwrite(str(folder / split / name / f"{number}.png"), pixels)
    return folder


def rewritten(source, destination, order=(0, 1, 2), names=FRUIT):
    """A checkpoint whose outputs are in another order, called otherwise, or not at all."""
    checkpoint = torch.load(source, weights_only=True)
    state, [optimizer] = checkpoint["state_dict"], checkpoint["optimizer_states"]
    tensors = [(state, name) for name in state if "classifier" in name]
    momenta = [(one, "momentum_buffer") for one in optimizer["state"].values()]
    tensors += [(one, name) for one, name in momenta if len(one[name]) == len(order)]  # three channels has it alone
    assert len(tensors) == 4
    for owner, name in tensors:
        owner[name] = owner[name][list(order)]
    classes = None if names is None else [names[place] for place in order]
    checkpoint[CARD_KEY] = json.dumps(json.loads(checkpoint[CARD_KEY]) | {"classes": classes})
    torch.save(checkpoint, destination)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with photos, a run that tells their classes apart, and checkpoints of it that differ in their names."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["syncbn"])
        photos = make_photos(folder / "photos")
        main(["fit", *WORDS, f"--data={photos}", f"--runs_folder={folder}", "--name=run", "--trainer.max_epochs=6"])
    make_photos(folder / "others", ("aprikose", "banane", "zapfen"))
    make_photos(folder / "fewer", FRUIT[1:], COLOURS[1:])
    make_photos(folder / "more", (*FRUIT, "date"), (*COLOURS, (0, 0, 0)))
    last = folder / "run" / "version_0" / "checkpoints" / "last.ckpt"
    shutil.copy(last, folder / "plain.ckpt")
    rewritten(last, folder / "turned.ckpt", (1, 2, 0))
    rewritten(last, folder / "nameless.ckpt", names=None)
    rewritten(last, folder / "foreign.ckpt", names=("aprikose", "banane", "zapfen"))
    return folder


def words_of(verb, folder, *checkpoints, data="photos"):
    """The command line of a verb that takes checkpoints and data."""
    paths = [str(folder / f"{name}.ckpt") for name in checkpoints]
    if verb == "table4":
        return ["paper", "table4", str(folder / data), f"[{','.join(paths)}]", "--accelerator=cpu", "--devices=1"]
    given = [f"--checkpoints=[{','.join(paths)}]"] if len(paths) > 1 else [f"--ckpt_path={paths[0]}"]
    more = {"fit": ["--trainer.max_epochs=7"], "statistics": ["--output=s.ckpt", "--num_batches=1"]}.get(verb, [])
    kept = [word for word in WORDS if verb == "fit" or not word.startswith("--test_after_fit")]
    return [verb, *kept, f"--data={folder / data}", *given, *more]


def resume(folder, data, checkpoint=None):
    """The command line that goes on with a copy of the run, from its newest checkpoint or from another in its place."""
    run = Path(shutil.copytree(folder / "run" / "version_0", checkpoint or "run"))
    if checkpoint:
        shutil.copy(folder / f"{checkpoint}.ckpt", run / "checkpoints" / "last.ckpt")
    return ["fit", *WORDS, f"--data={folder / data}", f"--resume={run}", "--trainer.max_epochs=7"]


def said(capsys):
    return "".join(capsys.readouterr())


@pytest.mark.parametrize("verb", ["test", "validate", "predict", "statistics", "fit", "table4"])
@pytest.mark.parametrize("data", ["others", "more"])
def test_other_names_are_refused(trained, verb, data, capsys):
    with pytest.raises(SystemExit):
        main(words_of(verb, trained, "plain", data=data))
    other = "the class 'aprikose' of the data (3 classes)" if data == "others" else "the class 'date' of the data (4 "
    error = [line for line in said(capsys).splitlines() if "error" in line]
    assert len(error) == 1 and other in error[0] and "data.classes_by_name=false" in error[0]
    assert not Path("runs").exists()


@pytest.mark.parametrize(("data", "first"), [("others", "'aprikose' of the data"), ("fewer", "'apple' of the checkpo")])
def test_a_run_does_not_go_on_with_other_classes(trained, data, first, capsys):
    with pytest.raises(SystemExit):
        main(resume(trained, data))
    assert f"error: the class {first}" in said(capsys)
    assert "finished" in Path("run/starts.jsonl").read_text().splitlines()[-1], "as if nobody had asked"


def test_the_same_names_are_matched(trained, capsys):
    main(words_of("test", trained, "plain"))
    plain = said(capsys)
    main(words_of("test", trained, "turned"))
    turned = said(capsys)
    assert "accuracy 100.00 %" in plain and "another number" not in plain
    assert "accuracy 100.00 %" in turned and "3 of 3 classes have another number in the checkpoint" in turned


def test_tables_are_in_the_order_of_the_checkpoint(trained, capsys):
    report = ["--trainer.callbacks=syncbn.training.ClassReport"]
    main([*words_of("validate", trained, "turned", data="fewer"), *report])
    assert "accuracy 100.00 % (top-5 100.00 %) on 16 images" in (text := said(capsys))
    assert "1 of the 3 classes of the checkpoint have no image" in text
    with Path("confusion_val.csv").open() as lines:
        table = list(csv.reader(lines))
    assert table[0][1:] == ["banana", "cherry", "apple"]
    assert [row[1:] for row in table[1:]] == [["8", "0", "0"], ["0", "8", "0"], ["0", "0", "0"]]
    main([*words_of("predict", trained, "turned"), "--predictions=p.csv"])
    with Path("p.csv").open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["label"] for row in rows] == [row["prediction"] for row in rows] == ["2"] * 8 + ["0"] * 8 + ["1"] * 8


def test_several_networks_are_averaged_by_name(trained, capsys):
    main(words_of("test", trained, "turned", "plain"))
    text = said(capsys)
    assert "accuracy 100.00 %" in text and "in the checkpoint: matched" in text and "plain.ckpt: matched" in text
    main(words_of("table4", trained, "turned", "plain"))
    assert said(capsys).count(" 0.00 % ") >= 5
    with pytest.raises(SystemExit):
        main(words_of("test", trained, "plain", "foreign"))
    assert "'apple' of" in (text := said(capsys)) and "foreign.ckpt" in text


def losses_of(run):
    with Path(run, "metrics.csv").open() as lines:
        return [float(row["train_loss"]) for row in csv.DictReader(lines) if row["train_loss"]]


def test_a_run_goes_on_in_the_order_of_its_checkpoint(trained, capsys):
    main(resume(trained, "photos", "plain"))
    assert "another number" not in said(capsys)
    main(resume(trained, "photos", "turned"))
    assert "3 of 3 classes have another number in the checkpoint" in said(capsys)
    after = torch.load("turned/checkpoints/last.ckpt", weights_only=True)
    assert json.loads(after[CARD_KEY])["classes"] == ["banana", "cherry", "apple"]
    assert len(losses_of("plain")) == 7 * 3, "steps"
    assert losses_of("turned") == pytest.approx(losses_of("plain"), rel=1e-3)


def test_by_position_where_it_is_meant(trained, capsys):
    for verb, data in (("test", "others"), ("test", "photos")):
        main([*words_of(verb, trained, "plain", data=data), "--data.classes_by_name=false"])
        assert "accuracy 100.00 %" in (text := said(capsys))
        assert ("3 of 3 classes have another name in the checkpoint ('aprikose' here, 'apple'" in text) == (
            data == "others"
        )
    main([*words_of("test", trained, "turned"), "--data.classes_by_name=false"])
    assert "accuracy 0.00 %" in said(capsys)
    main([*resume(trained, "others"), "--data.classes_by_name=false"])
    assert "'aprikose' here, 'apple' there" in said(capsys)


def test_checkpoints_without_a_card_name_no_classes():
    for checkpoint in ({}, {CARD_KEY: "no card"}, {CARD_KEY: json.dumps({"classes": None})}):
        assert classes_of(checkpoint) is None
    assert classes_of({CARD_KEY: json.dumps({"classes": FRUIT})}) == FRUIT


@pytest.mark.parametrize("checkpoints", [["nameless"], ["plain", "nameless"]])
def test_what_names_no_classes_cannot_be_compared(trained, checkpoints, capsys):
    main(words_of("test", trained, *checkpoints, data="photos"))
    assert "accuracy 100.00 %" in (text := said(capsys))
    assert text.count("the checkpoint does not name its classes") == 1


def test_embeddings_go_on_with_their_classes_and_are_tested_on_any(trained, capsys):
    words = [*WORDS, "--model.embedding_dimension=4", "--checkpoint.monitor=null", "--trainer.max_epochs=1"]
    main(["fit", *words, f"--data={trained / 'photos'}", "--name=e"])
    checkpoint = "runs/e/version_0/checkpoints/last.ckpt"
    tested = [word for word in words if "test_after" not in word and "--checkpoint.monitor" not in word]
    main(["test", *tested, f"--data={trained / 'others'}", f"--ckpt_path={checkpoint}"])
    assert "recall @1" in (text := said(capsys)) and "by name" not in text
    with pytest.raises(SystemExit):
        main(["fit", *words, f"--data={trained / 'others'}", "--resume=runs/e/version_0", "--trainer.max_epochs=2"])
    assert "error: the class 'aprikose' of the data" in said(capsys)
