"""The matrix as a picture: a heat map of the gain over the base, with the losses written in."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lora_rt.core.evaluation.matrix import BASE, Matrix
from lora_rt.errors import LoraRtError

_LONGEST_LABEL = 32


class PlotError(LoraRtError):
    """The picture can't be drawn or written."""


def without_a_screen(option: str) -> None:
    """Let matplotlib draw into files alone.

    Raises:
        PlotError: it is not installed; `option` is what asked for it.
    """
    try:
        import matplotlib
    except ImportError as error:
        text = f"{option} needs matplotlib"
        raise PlotError(text, next_step="Install it with: pip install 'lora-rt[plot]'") from error
    matplotlib.use("Agg")


def plot_matrix(matrix: Matrix, path: Path) -> None:
    """Write a PNG (or whatever the suffix says).

    Raises:
        PlotError: matplotlib is not installed, or the file can't be written.
    """
    without_a_screen("--plot")
    from matplotlib import pyplot

    names = list(matrix.losses)
    specs = list(next(iter(matrix.losses.values())))
    losses = np.array([[matrix.losses[name][spec].mean for spec in specs] for name in names])
    gains = losses[:, [specs.index(BASE)]] - losses
    reach = max(float(np.abs(gains).max()), 0.1)
    figure, axes = pyplot.subplots(figsize=(1.6 + 1.15 * len(specs), 1.4 + 0.62 * len(names)), layout="constrained")
    image = axes.imshow(gains, cmap="RdYlGn", vmin=-reach, vmax=reach, aspect="auto")
    axes.set_xticks(range(len(specs)), [_short(spec) for spec in specs], rotation=30, ha="right")
    axes.set_yticks(range(len(names)), [_short(name) for name in names])
    for (row, column), loss in np.ndenumerate(losses):
        axes.text(column, row, f"{loss:.2f}", ha="center", va="center")
    figure.colorbar(image, label="gain, nats")
    axes.set_title("negative log-likelihood per response token")
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise PlotError(
            f"{path} can't be written: {error}", next_step="Give a path that ends in .png, .svg or .pdf"
        ) from error
    finally:
        pyplot.close(figure)


def _short(label: str) -> str:
    """A label that leaves room for the matrix: of a long one (a path) the end, which tells it from its neighbours."""
    return label if len(label) <= _LONGEST_LABEL else "..." + label[3 - _LONGEST_LABEL :]
