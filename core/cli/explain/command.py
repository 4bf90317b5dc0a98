"""The command and its options."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_rt.core.cli import options

if TYPE_CHECKING:
    from lora_rt.core.requests.explaining import Explanation
    from lora_rt.core.runtime import Runtime


def explain(
    specs: options.Specs,
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="The text to look at.")],
    scene: options.Scene = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=0, help="Also look at a greedy answer of so many tokens.")
    ] = 0,
    heads: Annotated[bool, typer.Option("--heads", help="Also the attention heads of each register.")] = False,
    tokens: Annotated[bool, typer.Option("--tokens", help="Also each token.")] = False,
    png: Annotated[
        Path | None, typer.Option("--png", metavar="F.png", help="Draw the heat maps into this file.")
    ] = None,
    base: options.Base = "default",
    precision: options.Precision = "int4",
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Show how much each register adds to the base, layer by layer."""
    from lora_rt.core.cli.compose.request import look_up
    from lora_rt.core.cli.console import out, print_json
    from lora_rt.core.requests.composition import Composition

    composition = Composition.parse(" ".join(specs))
    look_up(composition)
    from lora_rt.core.runtime import Runtime

    runtime = Runtime.load(base, precision=precision, device=device)
    answer = ""
    if max_new_tokens:
        answer = runtime.generate(prompt, composition, scenes=[scene], max_new_tokens=max_new_tokens)
    explanation = runtime.explain(prompt, composition, scene=scene, answer=answer)
    if png is not None:
        from lora_rt.core.cli.explain.picture import draw

        draw(explanation, png)
    if as_json:
        print_json(document(runtime, explanation, prompt, str(composition), answer))
        return
    from lora_rt.core.cli.explain.terminal import show

    show(out, explanation, pieces(runtime, explanation), heads=heads, tokens=tokens)


def pieces(runtime: Runtime, explanation: Explanation) -> list[str]:
    """The text of each token."""
    return [runtime.tokenizer.decode([token]) for token in explanation.ids]


def document(runtime: Runtime, explanation: Explanation, prompt: str, spec: str, answer: str) -> dict[str, Any]:
    """The JSON form: every list is by adapter first."""

    def rounded(values: Any) -> Any:
        return [rounded(v) for v in values] if isinstance(values, list) else round(values, 5)

    return {
        "prompt": prompt,
        "answer": answer,
        "spec": spec,
        "scene_type": explanation.scene_type,
        "adapters": explanation.names,
        "tokens": pieces(runtime, explanation),
        "layers": rounded(explanation.layers.tolist()),
        "heads": rounded(explanation.heads.tolist()),
        "factors": rounded(explanation.factors.tolist()),
        "per_token": rounded(explanation.tokens.tolist()),
    }
