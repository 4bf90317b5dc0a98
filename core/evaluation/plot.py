"""The matrix as a picture: a heat map of the gain over the base, with the losses written in; and a knob's curve."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_rt.core.base.picture import canvas, check_plot, save

if TYPE_CHECKING:
    from lora_rt.core.evaluation.knob import Knob
    from lora_rt.core.evaluation.matrix import Matrix

_LONGEST_LABEL = 32


def plot_matrix(matrix: Matrix, path: Path) -> None:
    """Write a PNG (or whatever the suffix says).

    Raises:
        PlotError: matplotlib is not installed, or the file can't be written.
    """
    import numpy as np

    from lora_rt.core.evaluation.matrix import BASE

    check_plot(path)
    names = list(matrix.losses)
    specs = list(next(iter(matrix.losses.values())))
    losses = np.array([[matrix.losses[name][spec].mean for spec in specs] for name in names])
    gains = losses[:, [specs.index(BASE)]] - losses
    reach = max(float(np.abs(gains).max()), 0.1)
    figure, axes = canvas().subplots(figsize=(1.6 + 1.15 * len(specs), 1.4 + 0.62 * len(names)), layout="constrained")
    image = axes.imshow(gains, cmap="RdYlGn", vmin=-reach, vmax=reach, aspect="auto")
    axes.set_xticks(range(len(specs)), [_short(spec) for spec in specs], rotation=30, ha="right")
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    for (row, column), loss in np.ndenumerate(losses):
        axes.text(column, row, f"{loss:.2f}", ha="center", va="center")
    figure.colorbar(image, label="gain, nats")
    axes.set_title("negative log-likelihood per response token")
    save(figure, path)


def plot_knob(matrix: Matrix, knob: Knob, path: Path) -> None:
    """Write the curve of a knob: loss of each data set by weight, with its 95% interval and the base as a dashed line.

    Raises:
        PlotError: matplotlib is not installed, or the file can't be written.
    """
    from lora_rt.core.evaluation.matrix import BASE

    check_plot(path)
    figure, axes = canvas().subplots(figsize=(6.4, 4.2), layout="constrained")
    intervals = matrix.intervals()
    for name, row in matrix.losses.items():
        (line,) = axes.plot(knob.weights, [row[spec].mean for spec in knob.specs], marker="o", label=_short(name))
        low, high = zip(*(intervals[name][spec] for spec in knob.specs), strict=True)
        axes.fill_between(knob.weights, low, high, color=line.get_color(), alpha=0.15)
        axes.axhline(row[BASE].mean, color=line.get_color(), linestyle="--", linewidth=0.8)
    axes.set_xlabel(f"w in {_short(knob.first)}:w {_short(knob.second)}:1-w (dashed: the base)")
    axes.set_ylabel("nats per response token")
    axes.legend(title="text")
    save(figure, path)


def _short(label: str) -> str:
    """A label that leaves room for the matrix: of a long one (a path) the end, which tells it from its neighbours."""
    return label if len(label) <= _LONGEST_LABEL else "..." + label[3 - _LONGEST_LABEL :]
