"""The heat maps as a picture: layer x register, and layer x head of each register."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lora_rt.core.evaluation.plot import canvas, check_plot, save

if TYPE_CHECKING:
    from lora_rt.core.requests.explaining import Explanation


def draw(explanation: Explanation, path: Path, title: str) -> None:
    """Write a PNG (or whatever the suffix says).

    Args:
        explanation: what was measured.
        path: where it goes.
        title: names prompt and weights.

    Raises:
        PlotError: matplotlib is not installed, or the file can't be written.
    """
    check_plot(path, "--png")
    names = explanation.names
    heights = [len(names), *[explanation.heads.shape[2]] * len(names)]
    figure, axes = canvas().subplots(
        len(heights),
        1,
        figsize=(9, 1.2 + 0.22 * sum(heights)),
        height_ratios=heights,
        layout="constrained",
        sharex=True,
    )
    image = axes[0].imshow(explanation.layers.numpy(), aspect="auto", cmap="inferno", vmin=0)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_title(f"{title}\nwhat each register adds, relative to the base", fontsize=10)
    figure.colorbar(image, ax=axes[0])
    for index, name in enumerate(names):
        part = axes[index + 1].imshow(
            explanation.heads[index].T.numpy(),
            aspect="auto",
            cmap="inferno",
            vmin=0,
            vmax=float(explanation.heads.max()),
        )
        axes[index + 1].set_ylabel(f"{name}\nhead")
        figure.colorbar(part, ax=axes[index + 1])
    axes[-1].set_xlabel("layer")
    save(figure, path)
