"""How far from the paper's size an experiment is, in words for its report."""

from dataclasses import dataclass
from pathlib import Path

PAPER_IMAGES = 2_100_000 * 32
"""That BN-x5 takes to 72.2 %, the fewest of the models of Figure 3."""


@dataclass(frozen=True)
class Scale:
    """The size of what was trained.

    Attributes:
        width: Factor on the channel counts of the paper's network.
        image_size: In pixels.
        classes: Of the data.
        steps: Optimiser steps of each training; None for as many as its config says.
        batch_size: Images of a step; None where it is not known.
    """

    width: float
    image_size: int
    classes: int
    steps: int | None = None
    batch_size: int | None = None

    @property
    def is_the_papers(self) -> bool:
        """Whether network, images and classes are the paper's, and the training no shorter than its shortest."""
        trained = PAPER_IMAGES if self.steps is None else self.steps * (self.batch_size or 32)
        return (self.width, self.image_size, self.classes) == (1.0, 224, 1000) and trained >= PAPER_IMAGES

    def __str__(self) -> str:
        parts = ["full width" if self.width == 1 else f"{self.width:g} of the width"]
        parts += [f"{self.image_size} px", f"{self.classes:,} classes"]
        if self.steps is not None:
            of_images = f" of {self.batch_size} images" if self.batch_size else ""
            parts.append(f"{self.steps:,} steps{of_images}")
        return ", ".join(parts) + (": the paper's scale" if self.is_the_papers else ": not the paper's scale")


def scale_in_words(scale: Scale, notes: str | None) -> str:
    """A sentence beside the paper's numbers, with a link to the notes where there are any."""
    return f"Trained here: {scale}." + (f" What follows from that: [notes]({notes})." if notes else "")


def notes_beside(report: Path | None) -> str | None:
    """The path to ``notes.md`` from the folder of a report: there, or in the folder above; None where there is none."""
    if report is None:
        return None
    places = {"notes.md": report.parent, "../notes.md": report.parent.parent}
    return next((link for link, folder in places.items() if (folder / "notes.md").is_file()), None)
