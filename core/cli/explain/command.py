"""The command and its options."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_rt.core.base.picture import check_plot
from lora_rt.core.cli import options
from lora_rt.core.cli.compose.request import caution, check_scene, look_up, normalized
from lora_rt.core.cli.console import out, print_json
from lora_rt.core.cli.session import session
from lora_rt.core.generation.text import pieces_of

_LONGEST_TITLE = 80


def explain(
    specs: options.Specs,
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="The text to look at.")],
    scene: options.Scene = None,
    normalize: options.Normalize = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=0, help="Also look at a greedy answer of so many tokens.")
    ] = 0,
    heads: Annotated[
        bool, typer.Option("--heads", help="Also show how much each register adds at each attention head.")
    ] = False,
    tokens: Annotated[bool, typer.Option("--tokens", help="Also show how much is added at each token.")] = False,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="F.png", help="Draw the heat maps into this file.")
    ] = None,
    base: options.Base = "default",
    allow_base_mismatch: options.AllowBaseMismatch = False,
    precision: options.Precision = "int4",
    device: options.Device = "auto",
    template_var: options.TemplateVar = None,
    special_tokens: options.SpecialTokens = False,
    as_json: options.Json = False,
) -> None:
    """Show how much each register adds to the base, layer by layer."""
    composition = normalized(options.composition_of(specs), normalize)
    text = options.text_format(template_var, special_tokens, prompt)
    if png is not None:
        check_plot(png, "--png")
    check_scene(scene, composition, look_up(composition, base))
    caution(composition, base)
    runtime = session().runtime(base, precision, device, **text)
    answer = ""
    if max_new_tokens:
        answer = runtime.generate(prompt, composition, scenes=[scene], max_new_tokens=max_new_tokens)
    explanation = runtime.explain(prompt, composition, scene=scene, answer=answer)
    pieces = pieces_of(runtime.tokenizer, explanation.ids)
    title = f"{composition} on {_short(prompt)!r}"
    if png is not None:
        from lora_rt.core.cli.explain.picture import draw

        draw(explanation, png, title, pieces)
    if as_json:
        print_json(explanation.document(prompt, str(composition), answer, pieces))
        return
    from lora_rt.core.cli.explain.terminal import show

    out.print(title, markup=False, soft_wrap=not out.is_terminal)
    show(out, explanation, pieces, heads=heads, tokens=tokens)


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_TITLE else line[: _LONGEST_TITLE - 3] + "..."
