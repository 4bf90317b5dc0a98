"""The heat maps as a picture: layer x register, layer x head of each register, and token x register where it moves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_rt.core.base.picture import canvas, check_plot, save
from lora_rt.plugins.contract.terminal import harmless

if TYPE_CHECKING:
    from lora_rt.core.requests.explaining import Explanation


def draw(explanation: Explanation, path: Path, title: str, pieces: Sequence[str] = ()) -> None:
    """Write a PNG (or whatever the suffix says).

    Args:
        explanation: what was measured.
        path: where it goes.
        title: names prompt and weights.
        pieces: the text of each token.

    Raises:
        PlotError: matplotlib is not installed, or the file can't be written.
    """
    check_plot(path, "--png")
    names = explanation.names
    heights = [len(names), *[explanation.heads.shape[2]] * len(names), *[2 * len(names)] * explanation.moving]
    width = max(9.0, 0.16 * len(explanation.ids) * explanation.moving)
    figure, axes = canvas().subplots(
        len(heights), 1, figsize=(width, 1.2 + 0.22 * sum(heights)), height_ratios=heights, layout="constrained"
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
    axes[len(names)].set_xlabel("layer")
    if explanation.moving:
        last = axes[-1]
        image = last.imshow(explanation.weights.abs().numpy(), aspect="auto", cmap="inferno", vmin=0)
        last.set_yticks(range(len(names)), names)
        last.set_xticks(range(len(pieces)), [harmless(piece) for piece in pieces], rotation=90, fontsize=6)
        last.set_xlabel("weight at each token")
        figure.colorbar(image, ax=last)
    save(figure, path)
