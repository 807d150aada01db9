"""The trainings of Figure 2, and what the paper reports of them."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Model:
    """One training of the comparison.

    Attributes:
        name: Of its runs.
        label: In tables and legends.
        recipe: Name of its config, without .yaml.
        rate_factor: On the config's learning rate.
        options: Of ``syncbn fit``, besides those of all models.
        paper_steps: To 72.2 %, of 32 images; None where the paper has no number.
        paper_best: Its maximum accuracy in the paper, in 0..1; None where the paper has no number.
    """

    name: str
    label: str
    recipe: str
    rate_factor: float = 1.0
    options: tuple[str, ...] = ()
    paper_steps: float | None = None
    paper_best: float | None = None


MODELS = (
    Model("inception", "Inception", "inception", paper_steps=31.0e6, paper_best=0.722),
    Model("bn_baseline", "BN-Baseline", "bn_baseline", paper_steps=13.3e6, paper_best=0.727),
    Model("bn_x5", "BN-x5", "bn_x5", paper_steps=2.1e6, paper_best=0.730),
    Model("bn_x30", "BN-x30", "bn_x30", paper_steps=2.7e6, paper_best=0.748),
    Model("bn_x5_sigmoid", "BN-x5-Sigmoid", "bn_x5_sigmoid", paper_best=0.698),
)
"""The five models, the one to match first. Numbers: Figure 3 of the paper."""

NEGATIVES = (
    Model("inception_x5", "Inception at 5 times its rate", "inception", rate_factor=5.0),
    Model("inception_sigmoid", "Inception with sigmoid", "inception", options=("--model.activation=sigmoid",)),
)
"""What fails without BN by sections 4.2.1 and 4.2.2: parameters reach infinity, and the accuracy stays at chance."""
