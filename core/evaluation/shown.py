"""The matrix for people: as a table for the terminal, and as a picture; and a knob's curve."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.text import Text

from lora_rt.core.base.picture import canvas, check_plot, save
from lora_rt.core.evaluation.matrix import BASE, Matrix

if TYPE_CHECKING:
    from lora_rt.core.evaluation.knob import Knob

TITLE = "negative log-likelihood, nats per response token (95% interval)"
_LONGEST_LABEL = 32
_SHADES = ((1.0, "bold green"), (0.5, "green"), (0.05, "dim green"), (-0.05, "white"), (-10.0, "red"))


def plot_matrix(matrix: Matrix, path: Path) -> None:
    """A heat map of the gain over the base, with the losses written in: a PNG, or whatever the suffix says.

    Raises:
        PlotError: matplotlib is not installed, or the file can't be written.
    """
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


def matrix_table(matrix: Matrix) -> tuple[list[str], list[list[str | Text]]]:
    """Columns (data sets, the base, the compositions) and rows; the lowest loss of a row is underlined."""
    intervals = matrix.intervals()
    specs = list(next(iter(matrix.losses.values())))
    rows: list[list[str | Text]] = []
    for data, row in matrix.losses.items():
        base = row[BASE].mean
        best = min(row, key=lambda spec: row[spec].mean)
        cells: list[str | Text] = [data]
        for spec in specs:
            mean, (low, high) = row[spec].mean, intervals[data][spec]
            style = _shade(base - mean) + (" underline" if spec == best else "")
            cells.append(Text.assemble((f"{mean:.2f}", style), (f"\n{low:.2f} {high:.2f}", "dim")))
        rows.append(cells)
    return ["data", *specs], rows


def _shade(gain: float) -> str:
    return next((style for least, style in _SHADES if gain >= least), "bold red")
