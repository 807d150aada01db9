"""Pictures of the paper's ideas, in its order: each a small computation that a reader can repeat by hand.

Letters: m images of a mini-batch, C channels, x inputs, w weights, y outputs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

from syncbn.nn import SyncBatchNorm, estimate_population_statistics

DOTS_PER_INCH = 110
STEPS = 25  # of gradient descent
BATCH_SIZES = (2, 4, 8, 16, 32, 64, 128)
TINY = 1e-6  # below it an eigenvalue is drawn as it


def ideas(output: Path = Path("docs/figures")) -> None:
    """Draw the paper's ideas: centring and scaling, why not to whiten, gamma and beta, training against inference.

    Args:
        output: Folder for the PNG files.
    """
    output.mkdir(parents=True, exist_ok=True)
    pictures = {
        "scaling": draw_scaling,
        "whitening": draw_whitening,
        "gamma_beta": draw_gamma_and_beta,
        "inference": draw_inference,
    }
    for name, draw in pictures.items():
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        draw(figure)
        figure.savefig(output / f"{name}.png", dpi=DOTS_PER_INCH)
        print(output / f"{name}.png")


# ---- section 2: normalised inputs are easier to learn from ---------------------------------------


def descend(x: np.ndarray, y: np.ndarray, steps: int = STEPS) -> tuple[np.ndarray, float]:
    """Least squares by gradient descent from 0, at half of the largest rate that does not diverge.

    Args:
        x: Inputs, shape (m, 2).
        y: What to predict by x @ w, shape (m,).
        steps: How many.

    Returns:
        The weights before each step and at the end, shape (steps + 1, 2); and the condition number of the loss.
    """
    curvature = x.T @ x / len(x)
    eigenvalues = np.linalg.eigvalsh(curvature)
    rate = 1 / eigenvalues[-1]
    w = np.zeros(2)
    path = [w]
    for _ in range(steps):
        w = w - rate * x.T @ (x @ w - y) / len(x)
        path.append(w)
    return np.array(path), float(eigenvalues[-1] / eigenvalues[0])


def inputs_as_they_come() -> dict[str, np.ndarray]:
    """The same 1000 inputs of two channels: as they come, centred, and also scaled to variance 1. Shape (1000, 2)."""
    raw = np.random.default_rng(0).normal((2.0, 1.0), (1.0, 0.4), (1000, 2))
    centred = raw - raw.mean(0)
    return {"as they come": raw, "centred": centred, "centred and scaled": centred / centred.std(0)}


def draw_scaling(figure: Figure) -> None:
    """Contours of a linear layer's loss and the way of gradient descent on them."""
    panels = figure.subplots(1, 3)
    for axis, (name, x) in zip(panels, inputs_as_they_come().items(), strict=True):
        target = np.array([1.0, 1.0])
        y = x @ target
        path, condition = descend(x, y)
        grid = np.stack(np.meshgrid(np.linspace(-0.5, 2.5, 80), np.linspace(-0.5, 2.5, 80)), -1)
        error = grid - target
        loss = 0.5 * np.einsum("...i,ij,...j->...", error, x.T @ x / len(x), error)
        axis.contour(
            grid[..., 0], grid[..., 1], loss, levels=np.geomspace(1e-3, 10, 13), cmap="Greys_r", linewidths=0.8
        )
        axis.plot(*path.T, "o-", markersize=3, color="tab:red")
        axis.plot(*target, "*", markersize=12, color="tab:blue")
        axis.set(title=f"inputs {name}\ncondition number {condition:.1f}", xlabel="$w_1$", ylabel="$w_2$")
        left = np.linalg.norm(path[-1] - target) / np.linalg.norm(target)
        axis.text(0.03, 0.04, f"error after {STEPS} steps: {left:.1e}", transform=axis.transAxes)


# ---- section 2: why the gradient must know of the normalisation, and why not to whiten ------------


def train_bias(through_normalisation: bool, steps: int = STEPS) -> tuple[list[float], list[float]]:
    """Section 2's example: a layer adds a bias b to x and subtracts the mean of the sum over the mini-batch.

    Args:
        through_normalisation: Whether the gradient takes the mean's dependence on b into account.
        steps: Of gradient descent at rate 0.2.

    Returns:
        b and the loss, before each step.
    """
    x = torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    target = x - x.mean() + 0.5  # half a unit from anything the layer can give
    b = torch.zeros((), dtype=torch.float64, requires_grad=True)
    biases, losses = [], []
    for _ in range(steps):
        mean = (x + b).mean()
        y = x + b - (mean if through_normalisation else mean.detach())
        loss = (y - target).square().mean()
        biases.append(b.item())
        losses.append(loss.item())
        (gradient,) = torch.autograd.grad(loss, b)
        with torch.no_grad():
            b -= 0.2 * gradient
    return biases, losses


def spectrum_and_variances(C: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Of a mini-batch of independent N(0, 1) channels: eigenvalues of its covariance, and its variances, both sorted.

    Args:
        C: Channels.
        m: Images.

    Returns:
        Two arrays of shape (C,), the largest first.
    """
    x = np.random.default_rng(0).standard_normal((m, C))
    covariance = np.cov(x, rowvar=False, bias=True)
    return np.linalg.eigvalsh(covariance)[::-1], np.sort(x.var(0))[::-1]


def draw_whitening(figure: Figure) -> None:
    """Left two: a gradient that ignores the normalisation. Right: what a mini-batch knows of a covariance."""
    bias, loss, spectrum = figure.subplots(1, 3)
    for through, name, style in ((False, "gradient ignores the mean", "-"), (True, "gradient through the mean", "--")):
        biases, losses = train_bias(through)
        bias.plot(biases, style, label=name)
        loss.plot(losses, style, label=name)
    bias.set(title="the bias grows for ever ...", xlabel="step", ylabel="$b$")
    loss.set(title="... and the loss stays", xlabel="step", ylabel="loss", ylim=(0, 0.5))
    bias.legend()
    C, m = 64, 32
    eigenvalues, variances = spectrum_and_variances(C, m)
    spectrum.semilogy(eigenvalues.clip(TINY), label="eigenvalues of the covariance")
    spectrum.semilogy(variances, label="variances, channel by channel")
    spectrum.set(title=f"{C} channels seen by {m} images", xlabel="rank", ylabel="all are 1 in truth")
    spectrum.legend()


# ---- section 3: gamma and beta -------------------------------------------------------------------


def linear_share(gamma: float, beta: float) -> float:
    """How well a straight line describes a sigmoid on inputs of N(beta, gamma^2): the coefficient of determination."""
    x = beta + gamma * np.random.default_rng(0).standard_normal(100_000)
    return float(np.corrcoef(x, 1 / (1 + np.exp(-x)))[0, 1] ** 2)


def draw_gamma_and_beta(figure: Figure) -> None:
    """Where on a sigmoid normalised inputs lie, and where gamma and beta can bring them."""
    x = np.linspace(-9, 9, 400)
    for axis, (gamma, beta) in zip(figure.subplots(1, 3), ((1, 0), (4, 0), (1, 3)), strict=True):
        axis.plot(x, 1 / (1 + np.exp(-x)), color="black", label="sigmoid")
        density = np.exp(-0.5 * ((x - beta) / gamma) ** 2) / (gamma * np.sqrt(2 * np.pi))
        axis.fill_between(x, density / density.max(), alpha=0.3, label=r"inputs $\gamma\hat{x} + \beta$")
        title = rf"$\gamma = {gamma}$, $\beta = {beta}$: a line explains {linear_share(gamma, beta):.1%}"
        axis.set(title=title, xlabel="input", yticks=(0, 0.5, 1))
    figure.axes[0].legend(loc="upper left")


# ---- section 3.1: training against inference -----------------------------------------------------


def outputs_of_one_input(m: int, batches: int = 2000) -> tuple[np.ndarray, float]:
    """What a layer makes of the same input, 1, in mini-batches of m whose other inputs are N(0, 1).

    Args:
        m: Size of the mini-batches.
        batches: How many.

    Returns:
        The outputs in training mode, one for each mini-batch, shape (batches,); and with population statistics
        (Algorithm 2).
    """
    generator = torch.Generator().manual_seed(m)
    layer = SyncBatchNorm(1, affine=False).double()
    x = torch.randn(batches, m, 1, generator=generator, dtype=torch.float64)
    estimate_population_statistics(nn.Sequential(layer), list(x), batches)
    known = torch.ones(1, 1, dtype=torch.float64)
    with torch.no_grad():
        inferred = layer.eval()(known).item()
        layer.train()
        trained = [layer(torch.cat([known, others[1:]]))[0].item() for others in x]
    return np.array(trained), inferred


def mean_variance(m: int, batches: int = 20_000) -> float:
    """Mean over mini-batches of m inputs of N(0, 1) of their biased variance (Algorithm 1)."""
    return float(np.random.default_rng(m).standard_normal((batches, m)).var(1).mean())


def draw_inference(figure: Figure) -> None:
    """What depends on the other images of a mini-batch in training, and does not at inference."""
    spread, variance = figure.subplots(1, 2)
    sizes = BATCH_SIZES[1:]
    outputs = [outputs_of_one_input(m) for m in sizes]
    _draw_spread(spread, sizes, outputs)
    biased = np.array([mean_variance(m) for m in BATCH_SIZES])
    m = np.array(BATCH_SIZES)
    variance.semilogx(m, biased, "o-", label=r"$E_B[\sigma_B^2]$", base=2)
    variance.semilogx(m, m / (m - 1) * biased, "s-", label=r"$\frac{m}{m-1} E_B[\sigma_B^2]$ (Algorithm 2)", base=2)
    variance.axhline(1, color="black", linewidth=0.8)
    variance.set(title="estimates of a variance that is 1", xlabel="images in a mini-batch, m", xticks=m, ylim=(0, 1.2))
    variance.set_xticklabels(map(str, BATCH_SIZES))
    variance.legend(loc="lower right")


def _draw_spread(axis: Axes, sizes: Sequence[int], outputs: Sequence[tuple[np.ndarray, float]]) -> None:
    low, middle, high = np.percentile([trained for trained, _ in outputs], (15, 50, 85), axis=1)
    style: dict[str, Any] = {"color": "tab:orange"}
    axis.fill_between(sizes, low, high, alpha=0.3, label="in training: 15th to 85th percentile", **style)
    axis.plot(sizes, middle, **style)
    axis.plot(sizes, [inferred for _, inferred in outputs], "k.-", label="at inference")
    axis.set_xscale("log", base=2)
    axis.set(title="what becomes of the same input", xlabel="images in a mini-batch, m", ylabel="output", xticks=sizes)
    axis.set_xticklabels(map(str, sizes))
    axis.legend(loc="upper right")
