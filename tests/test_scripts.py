"""scripts/: the losses behind the README's picture come out again."""

import csv
import importlib
from pathlib import Path

import torch

SCRIPTS = Path(__file__).parents[1] / "scripts"
STEPS = 3


def committed(script, norm: str, ranks: int) -> torch.Tensor:
    """The first losses of a run in float64, as the file beside the picture has them."""
    with (script.FIGURES / "same_losses.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if (row["norm"], row["dtype"]) == (norm, "float64")]
    return torch.tensor([float(row["loss"]) for row in rows if row["ranks"] == str(ranks)][:STEPS], dtype=torch.float64)


def test_two_ranks_lose_what_the_picture_shows(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    script = importlib.import_module("draw_same_losses")
    losses = dict(zip(script.RUNS, script.run(2, STEPS), strict=True))
    one_rank = committed(script, "syncbn", ranks=1)
    torch.testing.assert_close(losses["syncbn", torch.float64], one_rank, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(losses["plain", torch.float64], committed(script, "plain", 2), rtol=1e-12, atol=1e-12)
    assert (losses["plain", torch.float64] - one_rank).abs().max() > 1e-3
