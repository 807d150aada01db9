"""The verbs of the command: for its help, and to find the module of each. Imports nothing, so that help is fast."""

VERBS = {
    "Train": {
        "fit": ("train a network", "syncbn fit --config configs/fashion_mnist.yaml"),
        "validate": ("measure a checkpoint on the validation images", "syncbn validate runs/fashion_mnist/version_0"),
        "test": ("measure a checkpoint on the test images", "syncbn test runs/fashion_mnist/version_0"),
        "statistics": (
            "estimate the population statistics of a checkpoint anew",
            "syncbn statistics runs/fashion_mnist/version_0 --output new.ckpt",
        ),
    },
    "Use a trained network": {
        "predict": ("classify images, or embed them", "syncbn predict runs/fashion_mnist/version_0 photos/"),
        "export": ("write it for other programs", "syncbn export runs/fashion_mnist/version_0 --output network.onnx"),
        "import": ("convert weights of Cadene's or TF-slim's layout", "syncbn import bn_inception.pth"),
    },
    "Images": {
        "data": ("show the images as the network sees them", "syncbn data show photos/ --output seen.png"),
        "prepare": ("write archives or folders of images as shards", "syncbn prepare folder photos/ shards/"),
    },
    "Check and measure": {
        "doctor": ("check the machines before a fit", "syncbn doctor --config configs/fashion_mnist.yaml"),
        "benchmark": ("time the layers and the loader", "syncbn benchmark --section layer --quick"),
        "paper": ("reproduce the paper's figures and tables", "syncbn paper ideas"),
    },
}
"""By subject: of each verb, what it does and an example."""

MODULES = {
    "benchmark": "syncbn.benchmarks.command",
    "data": "syncbn.data.show",
    "doctor": "syncbn.doctor.command",
    "export": "syncbn.inference.export",
    "import": "syncbn.models.weights.command",
    "paper": "syncbn.experiments.command",
    "prepare": "syncbn.data.preparation.command",
}
"""Where the verbs are that are not Lightning's; a module holds COMMANDS, its functions, or `run`."""

OF_TRAINER = ("fit", "validate", "test", "predict", "statistics")
"""Verbs of the command line that Lightning makes; ``predict`` also takes weights and images."""

MEANT = "did you mean"
"""How a suggestion begins."""

DOCUMENTATION = "README.md and docs/index.md of the source; `make docs` makes pages of HTML"


def describe_verbs(version: str) -> str:
    """The help of the command."""
    lines = [
        f"syncbn {version}: synchronised BatchNorm for PyTorch, and the trainer around it",
        "",
        "usage: syncbn VERB [options]",
        "       syncbn VERB --help",
        "       syncbn --version",
    ]
    for subject, verbs in VERBS.items():
        lines += ["", f"{subject}:"]
        for verb, (purpose, example) in verbs.items():
            lines += [f"  {verb:<12}{purpose}", f"  {'':<12}$ {example}"]
    return "\n".join([*lines, "", f"Documentation: {DOCUMENTATION}"])


def closest(word: str, known: list[str]) -> str:
    """What was probably meant by a word that is not known: "; did you mean ...?", or "" where nothing is like it."""
    from difflib import get_close_matches

    likely = get_close_matches(word, known, n=1)
    return f"; {MEANT} {likely[0]}?" if likely else ""
