"""`lora-rt explain`: what each register adds, as heat maps made of coloured cells, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.cells import cell_len
from rich.console import Console
from rich.markup import escape
from rich.text import Text

from lora_rt.core.base.picture import canvas, check_plot, save
from lora_rt.core.cli import options
from lora_rt.core.cli.console import out, print_json
from lora_rt.core.cli.look_up import caution, check_scene, look_up, normalized
from lora_rt.core.cli.session import session
from lora_rt.core.cli.wrapping import padded
from lora_rt.core.generation.text import pieces_of
from lora_rt.plugins.contract.terminal import harmless

if TYPE_CHECKING:
    from torch import Tensor

    from lora_rt.core.requests.explaining import Explanation

_LONGEST_TITLE = 80
# From dark to bright; a terminal without colours still tells the blocks apart.
_SHADES = ((" ", "grey15"), ("░", "blue"), ("▒", "cyan"), ("▓", "yellow"), ("█", "bright_red"))


@options.spread
def explain(
    specs: options.Specs,
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="The text to look at.")],
    over: options.OverBase,
    scene: options.Scene = None,
    normalize: options.Normalize = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=0, help="Also look at a greedy answer of this many tokens.")
    ] = 0,
    heads: Annotated[
        bool, typer.Option("--heads", help="Also show how much each register adds at each attention head.")
    ] = False,
    tokens: Annotated[bool, typer.Option("--tokens", help="Also show how much is added at each token.")] = False,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="F.png", help="Draw the heat maps into this file.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Show how much each register adds to the base, layer by layer."""
    composition = normalized(options.composition_of(specs), normalize)
    text = over.text(prompt)
    if png is not None:
        check_plot(png, "--png")
    check_scene(scene, composition, look_up(composition, over.base))
    caution(composition, over.base)
    runtime = session().runtime(over.base, over.precision, over.device, **text)
    answer = ""
    if max_new_tokens:
        answer = runtime.generate(prompt, composition, scenes=[scene], max_new_tokens=max_new_tokens)
    explanation = runtime.explain(prompt, composition, scene=scene, answer=answer)
    pieces = pieces_of(runtime.tokenizer, explanation.ids)
    title = f"{composition} on {_short(prompt)!r}"
    if png is not None:
        draw(explanation, png, title, pieces)
    if as_json:
        print_json(explanation.document(prompt, str(composition), answer, pieces))
        return
    out.print(title, markup=False, soft_wrap=not out.is_terminal)
    show(out, explanation, pieces, heads=heads, tokens=tokens)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_TITLE else line[: _LONGEST_TITLE - 3] + "..."


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
    if explanation.moving and console.color_system is None:
        _table(console, explanation, pieces)
    elif explanation.moving:
        largest = float(explanation.weights.abs().max())
        console.print(f"\n[bold]weight of each at each token[/]: dark is 0, bright is {largest:.2f}", soft_wrap=True)
        for index, name in enumerate(explanation.names):
            line = Text(f"{padded(name, width, right=True)}  ")
            line.append_text(_coloured(pieces, explanation.weights[index].abs(), largest))
            line.append(f"  {float(explanation.weights[index].mean()):.2f}")
            console.print(line, soft_wrap=True)
    if tokens:
        for index, name in enumerate(explanation.names):
            console.print(f"\n[bold]{escape(name)}[/]")
            console.print(_coloured(pieces, explanation.tokens[index], float(explanation.tokens.max())), soft_wrap=True)


def _table(console: Console, explanation: Explanation, pieces: Sequence[str]) -> None:
    """The weight of each adapter at each token, for where no colour can show it."""
    console.print("\nweight of each at each token", soft_wrap=True)
    width = max(cell_len(name) for name in explanation.names)
    console.print("  ".join(padded(name, width, right=True) for name in explanation.names), soft_wrap=True)
    for piece, weights in zip(pieces, explanation.weights.T.tolist(), strict=True):
        row = "  ".join(padded(f"{weight:.2f}", width, right=True) for weight in weights)
        console.print(f"{row}  {harmless(piece)!r}", markup=False, soft_wrap=True)


def _legend(console: Console, explanation: Explanation) -> None:
    kind = explanation.scene_type
    if isinstance(kind, str):
        text = kind
    elif kind is None:
        text = "not recognized"
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


def draw(explanation: Explanation, path: Path, title: str, pieces: Sequence[str] = ()) -> None:
    """Layer x register, layer x head of each register, and token x register where it moves, as a PNG, SVG or PDF.

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
