"""The ``syncbn`` command: what it writes and prints, and what it says about mistakes."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import pytest
import torch
import yaml

import syncbn
from syncbn.cli import main
from syncbn.verbs import MODULES, OF_TRAINER, VERBS

CONFIGS = Path(__file__).parents[1] / "configs"
FASHION_MNIST = CONFIGS / "fashion_mnist.yaml"

QUICK = [
    *("--data.image_size=16", "--global_batch_size=32", "--model.width_multiplier=0.125", "--trainer.max_epochs=1"),
    *("--trainer.limit_train_batches=3", "--trainer.limit_val_batches=2", "--trainer.limit_test_batches=2"),
    *("--trainer.log_every_n_steps=1", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"),
]

pytestmark = [
    pytest.mark.usefixtures("own_folder"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::jsonargparse._deprecated.JsonargparseDeprecationWarning"),
]


def run_command(*words: str, module: bool = False) -> subprocess.CompletedProcess[str]:
    """Run the command as a user would, with one thread for each rank."""
    start = ["-m", "syncbn"] if module else [str(Path(sys.executable).with_name("syncbn"))]
    return subprocess.run(
        [sys.executable, *start, *words],
        env=os.environ | {"MASTER_ADDR": "127.0.0.1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def check_summary(folder: Path, *, ranks: int, waits: bool) -> None:
    """Check the folder's summary."""
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["exit"], summary["steps"], summary["ranks"]) == ("finished", 3, ranks)
    assert summary["run_folder"] == str(folder) and 0 <= summary["metrics"]["test_top1"] <= 1
    assert summary["versions"]["torch"] == torch.__version__
    parts = [part["mean"] for part in summary["parts_seconds"].values()]
    assert 0.5 < sum(parts) / summary["step_seconds"]["mean"] < 2  # ranks take part in the same steps
    assert (summary["parts_seconds"]["collective_wait"]["mean"] > 0) == waits
    assert 0.05 < summary["memory_gib"]["mean"] < 20


def check_run_folder(output: str, *, ranks: int, waits: bool) -> Path:
    """Check the last lines of a fit, whose layers wait for each other or do not, and what its folder holds."""
    lines = output.strip().splitlines()
    folder = Path(lines[-1])
    assert folder.parent == Path("runs/fashion_mnist") and folder.is_dir()
    assert re.match(r"test accuracy \d+\.\d\d % \(top-5 \d+\.\d\d %\) on 64 images with best-", lines[-5])
    best = Path(lines[-4].removeprefix("best checkpoint ").strip())
    assert best.parent == folder / "checkpoints" and best.name.startswith("best-") and best.is_file()
    assert lines[-3].split() == ["curves", f"{folder}/curves.png"]
    assert lines[-2].split() == ["predict", "with", "syncbn", "predict", str(folder), "IMAGES"]
    assert len([line for line in lines if line.endswith(f"run folder {folder}")]) == 1
    check_summary(folder, ranks=ranks, waits=waits)
    assert any(f"global batch 32 = {ranks} rank" in line for line in lines)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["global_batch_size"] == 32 and config["model"]["width_multiplier"] == 0.125
    provenance = yaml.safe_load((folder / "provenance.yaml").read_text())
    assert provenance["git_revision"] and provenance["ranks"] == ranks
    with (folder / "metrics.csv").open(newline="") as lines_of_log:
        rows = list(csv.DictReader(lines_of_log))
    assert [int(row["step"]) for row in rows if row["train_loss"]] == [0, 1, 2]
    assert all(float(row["images_per_second"]) > 0 and row["backward_seconds"] for row in rows if row["train_loss"])
    assert sum(bool(row["val_top1"]) for row in rows) == 1
    assert cv2.imread(str(folder / "curves.png")) is not None
    assert list(folder.glob("events.out.tfevents.*"))
    checkpoints = list((folder / "checkpoints").iterdir())
    assert len(checkpoints) == 2 and folder / "checkpoints" / "last.ckpt" in checkpoints
    for checkpoint in checkpoints:
        torch.load(checkpoint, weights_only=True)
    return folder


def test_fit_then_test_and_predict_in_one_process(capsys):
    main(["fit", "--config", str(FASHION_MNIST), "--trainer.devices=1", *QUICK])
    folder = check_run_folder(capsys.readouterr().out, ranks=1, waits=False)
    again = ["--config", str(folder / "config.yaml"), "--ckpt_path", str(folder / "checkpoints" / "last.ckpt")]
    sys.argv[:] = ["syncbn"]
    main(["test", *again])
    assert re.match(r"test accuracy .* with last\.ckpt", capsys.readouterr().out.strip().splitlines()[-1])
    main(["validate", *again])
    assert capsys.readouterr().out.strip().splitlines()[-1].startswith("validation accuracy")
    main(["predict", *again, "--trainer.limit_predict_batches=2"])
    assert capsys.readouterr().out.strip().splitlines()[-1] == "predictions.csv"
    with Path("predictions.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [int(row["index"]) for row in rows] == list(range(64))
    sys.argv[:] = ["syncbn"]
    main(["test", str(folder)])
    said = capsys.readouterr()
    assert re.search(r"test accuracy .* with best-.*\.ckpt$", said.out.strip())
    assert re.search(rf"syncbn: takes {folder}/checkpoints/best-\S+, the best checkpoint of the run, and the", said.err)
    cv2.imwrite("image.png", torch.zeros(28, 28).numpy())
    with pytest.raises(SystemExit) as exited:
        main(["predict", str(folder), "image.png", "--format=csv"])
    said = capsys.readouterr()
    assert (
        exited.value.code == 0 and said.out.count("image.png") == 5 and f"takes {folder}/checkpoints/best-" in said.err
    )
    main(["export", str(folder), "--format=safetensors", "--output=network.safetensors"])
    assert Path("network.safetensors").is_file() and f"takes {folder}/checkpoints/best-" in capsys.readouterr().err
    main(["predict", str(folder), "--trainer.limit_predict_batches=1"])
    assert capsys.readouterr().out.strip().splitlines()[-1] == "predictions.csv"
    main(["fit", *again[:2], "--trainer.fast_dev_run=true"])
    assert len(list(Path("runs/fashion_mnist").iterdir())) == 1


@pytest.mark.parametrize("apart", [False, True])
def test_fit_on_two_processes(apart):
    """By the script; and by `python -m`, with ranks that normalise apart."""
    words = ["--trainer.devices=2", *["--model.normalization_batch_size=16"] * apart]
    finished = run_command("fit", "--config", str(FASHION_MNIST), *QUICK, *words, module=apart)
    assert finished.returncode == 0, finished.stderr
    check_run_folder(finished.stdout, ranks=2, waits=not apart)
    assert "Warning" not in finished.stderr, finished.stderr
    assert ("BatchNorm normalises over 16 images (1 rank)" in finished.stdout) == apart


@pytest.mark.parametrize("config", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_is_accepted(config, capsys):
    sys.argv[1:] = ["fit", "--config", str(config), "--print_config"]
    with pytest.raises(SystemExit) as exited:
        main()
    assert exited.value.code in (0, None)
    assert yaml.safe_load(capsys.readouterr().out)["global_batch_size"] > 0
    assert config.read_text().startswith("#"), "a config begins with its command, time and accuracy"


MISTAKES = {
    "a key that does not exist": (["--model.widht=1"], "widht"),
    "a top-level key that does not exist": (["--bacth_size=1"], "bacth_size"),
    "a missing data folder": (["--data.root=/no/such/folder"], "no data at '/no/such/folder'"),
    "the same in short": (["--data", "/no/such/folder"], "no data at '/no/such/folder'"),
    "an unknown variant": (["--model.variant=vgg"], "vgg"),
    "a batch that cannot be divided": (
        ["--global_batch_size=31", "--trainer.devices=2"],
        "global_batch_size=31 cannot be divided among 2 ranks: it must be a multiple of 2; nearest: 30 or 32",
    ),
    "a batch that is no number": (["--global_batch_size=many"], "many"),
    "a batch knob elsewhere": (["--data.global_batch_size=8"], "global_batch_size"),
    "a value out of range": (["--data.augmentation.max_shift=-1"], "max_shift=-1"),
    "no batch": (["--global_batch_size=0"], "global_batch_size=0 must be at least 1"),
    "labels smoothed to less than nothing": (["--model.label_smoothing=-1"], "label_smoothing=-1.0 must be in [0, 1)"),
    "weights that grow": (["--model.norm_weight_decay=-1"], "norm_weight_decay=-1.0 must not be negative"),
    "no interval": (["--trainer.val_check_interval=0"], "trainer.val_check_interval=0: give batches"),
    "a log that is needed": (["--trainer.logger=false"], "trainer.logger=false"),
    "a missing checkpoint": (["--ckpt_path=/no/such.ckpt"], "/no/such.ckpt"),
    "a checkpoint of this process": (["--ckpt_path=best"], "RUN_FOLDER/checkpoints/last.ckpt"),
    "a callback that changes the batch": (
        ["--trainer.callbacks=lightning.pytorch.callbacks.BatchSizeFinder"],
        "with global_batch_size=32: changes the batch: use global_batch_size",
    ),
    "a monitor that never comes": (
        ["--config=monitor.yaml", "--trainer.max_steps=1"],
        "EarlyStopping.monitor=val_top1: this run has no validation (it ends after step 1 of 3 an epoch",
    ),
    "a monitor that nobody logs": (["--checkpoint.monitor=val_acc"], "checkpoint.monitor=val_acc is logged by nobody"),
    "an epoch that ends within a global batch": (
        ["--trainer.accumulate_grad_batches=2"],
        "trainer.limit_train_batches=3 (or overfit_batches) ends an epoch after 3 of",
    ),
    "a network of one's own": (["--model=my.Net"], "--model my.Net: the command trains Inception-BN"),
    "null for a number": (["--config=null.yaml"], "model.momentum: expected float, not null"),
    "null within an object": (["--config=null_within.yaml"], "data.augmentation.max_shift=null"),
    "random layers that are held": (
        ["--model.batch_norm=partial"],
        "model.batch_norm=partial without model.weights would hold layers that are random",
    ),
}


@pytest.mark.parametrize(("words", "expected"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_answered_in_one_line(words, expected, capsys):
    stops_early = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val_top1"}}
    Path("monitor.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks": [stops_early]}}))
    Path("null.yaml").write_text("model: {momentum: null}\n")
    Path("null_within.yaml").write_text("data: {augmentation: {max_shift: null}}\n")
    with pytest.raises(SystemExit) as exited:
        main(["fit", "--config", str(FASHION_MNIST), "--trainer.devices=1", *QUICK, *words])
    assert exited.value.code not in (0, None)
    errors = capsys.readouterr().err.strip().splitlines()
    assert errors[-1].startswith("syncbn: error:") and expected in errors[-1]
    assert not any("Traceback" in line or line.startswith("usage") for line in errors)
    assert len([line for line in errors if "error" in line]) == 1


@pytest.mark.parametrize(
    ("verb", "word", "expected"),
    [
        ("fit", "--model.momentum=0.5", "last.ckpt has model.momentum=0.9, which cannot be made 0.5"),
        ("fit", "--global_batch_size=64", "last.ckpt has global_batch_size=32, which cannot be made 64"),
        ("test", "--model.momentum=0.5", "last.ckpt has model.momentum=0.9, which cannot be made 0.5"),
        ("fit", "--model.weights=other.pth", "last.ckpt brings its weights: leave --model.weights out"),
        ("fit", "--resume=runs/name/version_0", "goes on from the run's own checkpoint: leave --ckpt_path out"),
    ],
)
def test_what_a_checkpoint_would_override_is_refused(verb, word, expected, capsys):
    kept = {"momentum": 0.9, "global_batch_size": 32, "weights": None}
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.0", "hyper_parameters": kept}, "last.ckpt")
    with pytest.raises(SystemExit):
        main([verb, "--config", str(FASHION_MNIST), "--global_batch_size=32", "--ckpt_path=last.ckpt", word])
    assert expected in capsys.readouterr().err.strip().splitlines()[-1]


def test_weights_in_the_place_of_a_checkpoint(capsys):
    torch.save({"features.0.weight": torch.zeros(1)}, "weights.pth")
    with pytest.raises(SystemExit):
        main(["test", "--config", str(FASHION_MNIST), "--ckpt_path=weights.pth"])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--ckpt_path weights.pth holds weights" in error and "by --model.weights" in error


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_broken_image_is_named(num_workers, tmp_path, capsys):
    for folder in (tmp_path / split / name for split in ("train", "val") for name in ("ant", "bee")):
        folder.mkdir(parents=True)
        for number in range(16):
            (folder / f"{number}.jpg").write_bytes(b"broken")
    words = [
        "--data",
        str(tmp_path),
        "--data.validation_images=0",
        f"--data.num_workers={num_workers}",
        "--data.on_read_error=stop",
    ]
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(FASHION_MNIST), "--trainer.devices=1", *QUICK, *words])
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.match(r"syncbn: error: cannot decode the image .*/(ant|bee)/\d+\.jpg \(6 bytes\)", last)


def test_an_interrupted_fit_keeps_its_curves_and_names_its_folder():
    command = [str(Path(sys.executable).with_name("syncbn")), "fit", "--config", str(FASHION_MNIST), *QUICK]
    command += ["--trainer.devices=1", "--trainer.limit_train_batches=1.0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        started = time.monotonic()
        while not list(Path().glob("runs/*/*/metrics.csv")):
            assert process.poll() is None and time.monotonic() - started < 60
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGINT and "Traceback" not in errors
    folder = Path(output.strip().splitlines()[-1])
    assert f"; --resume {folder} goes on there" in errors and list((folder / "checkpoints").glob("step=*.ckpt"))
    assert (folder / "curves.png").is_file() and (folder / "config.yaml").is_file()


def test_a_key_in_a_config_that_does_not_exist(tmp_path, capsys):
    config = tmp_path / "mine.yaml"
    config.write_text(FASHION_MNIST.read_text().replace("global_batch_size:", "globl_batch_size:", 1))
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(config)])
    assert "globl_batch_size" in capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ("name: x\ndata: {root: photos}\ndata: {image_size: 32}\n", "'data' is in line 2 and again in line 3"),
        ("trainer:\n  callbacks:\n  - {class_path: Timer, init_args: {a: 1, a: 2}}\n", "'a' is in line 3 and again in"),
    ],
)
def test_a_key_that_a_config_says_twice(config, expected, tmp_path, capsys):
    (tmp_path / "twice.yaml").write_text(config)
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(tmp_path / "twice.yaml")])
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["fti"], "fit"),
        (["fit", "--model.varient=cadene"], "--model.variant"),
        (["fit", "--config=top.yaml"], "global_batch_size"),
        (["fit", "--config=nested.yaml"], "trainer.max_epochs"),
        (["fit", "--config=within.yaml"], "max_shift"),
        (["paper", "figur1"], "figure1"),
        (["predict", "--topk=3", "weights.ckpt", "photos"], "--top_k"),
    ],
)
def test_what_was_probably_meant_is_said(words, meant, capsys):
    Path("top.yaml").write_text("globl_batch_size: 32\n")
    Path("nested.yaml").write_text("trainer: {max_epoch: 1}\n")
    Path("within.yaml").write_text("data: {augmentation: {max_shfit: 1}}\n")
    with pytest.raises(SystemExit):
        main(words)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("syncbn: error:") and last.endswith(f"; did you mean {meant}?")


def test_the_help_of_a_fit_has_our_options_in_plain_text_and_lightnings_on_request(capsys):
    for word, shown, hidden in (("--help", "model", "trainer"), ("--help.trainer", "trainer", "model")):
        with pytest.raises(SystemExit) as exited:
            main(["fit", word])
        text = capsys.readouterr().out
        assert exited.value.code == 0 and f"--{shown}." in text and f"\n  --{hidden}." not in text
        assert "``" not in text and ":class:" not in text


def test_a_missing_config_and_a_missing_verb(capsys):
    for words in (["fit", "--config", "nowhere.yaml"], ["train"], [], ["fit"], ["test", "nowhere"]):
        with pytest.raises(SystemExit) as exited:
            main(words)
        assert exited.value.code not in (0, None)
        said = capsys.readouterr().err.strip()
        assert said.splitlines()[-1].startswith("syncbn: error:")
        if words == ["fit"]:
            assert re.search(r"--config \S*configs/fashion_mnist\.yaml\n +A narrow Inception-BN on 10,000 images", said)


def test_the_examples_of_the_help_fit_their_verbs():
    examples = [example for verbs in VERBS.values() for _, example in verbs.values()]
    assert all(len(example) <= 66 for example in examples), "of 80 columns"


def test_the_command_itself_exits_with_an_error_and_no_traceback():
    finished = run_command("fit", "--config", str(FASHION_MNIST), "--data.root=/no/such/folder")
    assert finished.returncode != 0 and "Traceback" not in finished.stderr
    assert finished.stderr.strip().splitlines()[-1].startswith("syncbn: error: no data at '/no/such/folder'")


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_help_and_version_need_neither_torch_nor_jsonargparse(word):
    code = (
        f"import sys, syncbn.cli; before = {{*sys.modules}}; syncbn.cli.main([{word!r}])\n"
        "sys.exit(' '.join(sorted({*sys.modules} - before)) if len(sys.modules) > 150 or 'torch' in sys.modules else 0)"
    )
    said = subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True, text=True).stdout
    assert syncbn.__version__ in said
    if word == "--help":
        for verb in [verb for verbs in VERBS.values() for verb in verbs]:
            assert re.search(rf"^  {verb} .*\n +\$ syncbn {verb} ", said, re.M)
        assert {*MODULES, *OF_TRAINER} == {verb for verbs in VERBS.values() for verb in verbs}


def test_an_interrupt_while_it_prepares_is_no_traceback(monkeypatch):
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("syncbn.cli.run_command", interrupted)
    with pytest.raises(SystemExit) as exited:
        main(["doctor"])
    assert exited.value.code == 128 + signal.SIGINT
