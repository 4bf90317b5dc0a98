"""Heat maps made of coloured cells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from lora_rt.core.cli.wrapping import padded
from lora_rt.plugins.contract.terminal import harmless

if TYPE_CHECKING:
    from torch import Tensor

    from lora_rt.core.requests.explaining import Explanation

# From dark to bright; a terminal without colours still tells the blocks apart.
_SHADES = ((" ", "grey15"), ("░", "blue"), ("▒", "cyan"), ("▓", "yellow"), ("█", "bright_red"))


def show(console: Console, explanation: Explanation, pieces: Sequence[str], *, heads: bool, tokens: bool) -> None:
    """Layer x register; with `heads` one line per head of each register, with `tokens` the text of each."""
    width = max(cell_len(name) for name in explanation.names)
    _legend(console, explanation)
    top = float(explanation.layers.max())
    layers = explanation.layers.shape[1]
    ruler = "".join(f"{n:<5}" for n in range(0, layers, 5))
    console.print(f"{'layer':>{width}}  {ruler}", soft_wrap=True)
    for index, name in enumerate(explanation.names):
        _line(
            console,
            padded(name, width, right=True),
            explanation.layers[index],
            top,
            f"{float(explanation.layers[index].mean()):.3f}",
        )
        if heads:
            best = float(explanation.heads.max())
            for head in range(explanation.heads.shape[2]):
                factor = f"x{float(explanation.factors[index, :, head].mean()):.2f}"
                _line(
                    console, padded(f"head {head}", width, right=True), explanation.heads[index, :, head], best, factor
                )
    if explanation.moving:
        console.print("\n[bold]weight of each at each token[/]: dark is 0", soft_wrap=True)
        largest = float(explanation.weights.abs().max())
        for index, name in enumerate(explanation.names):
            line = Text(f"{padded(name, width, right=True)}  ")
            line.append_text(_coloured(pieces, explanation.weights[index].abs(), largest))
            line.append(f"  {float(explanation.weights[index].mean()):.2f}")
            console.print(line, soft_wrap=True)
    if tokens:
        for index, name in enumerate(explanation.names):
            console.print(f"\n[bold]{escape(name)}[/]")
            console.print(_coloured(pieces, explanation.tokens[index], float(explanation.tokens.max())), soft_wrap=True)


def _legend(console: Console, explanation: Explanation) -> None:
    kind = explanation.scene_type
    if isinstance(kind, str):
        text = kind
    elif kind is None:
        text = "not registered"
    else:
        text = ", ".join(f"{name} {share:.0%}" for name, share in sorted(kind.items(), key=lambda item: -item[1]))
    top = float(explanation.layers.max())
    console.print(f"scene type: {escape(text)}", soft_wrap=True)
    console.print(
        f"what each adds, relative to the base: dark is 0, bright is {top:.2f}; mean at the end", soft_wrap=True
    )


def _line(console: Console, label: str, values: Tensor, top: float, end: str) -> None:
    line = Text(f"{label}  ")
    for value in values.tolist():
        block, colour = _shade(value, top)
        line.append(block, style=f"{colour} on grey15")
    line.append(f"  {end}")
    console.print(line, soft_wrap=True)


def _shade(value: float, top: float) -> tuple[str, str]:
    return _SHADES[min(len(_SHADES) - 1, round((len(_SHADES) - 1) * value / max(top, 1e-9)))]


def _coloured(pieces: Sequence[str], values: Tensor, top: float) -> Text:
    text = Text()
    for piece, value in zip(pieces, values.tolist(), strict=True):
        text.append(harmless(piece), style=f"reverse {_shade(value, top)[1]}")
    return text
