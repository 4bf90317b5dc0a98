"""The command and its options."""

from __future__ import annotations

from typing import Annotated

import typer

from lora_rt.core.cli import options
from lora_rt.core.cli.compose.request import ComposeRequest


def compose(
    specs: options.Specs,
    prompt: Annotated[
        str | None, typer.Option("-p", "--prompt", help="The prompt; standard input or a chat if left out.")
    ] = None,
    base: options.Base = "default",
    precision: options.Precision = "int4",
    device: options.Device = "auto",
    scene: options.Scene = None,
    after: Annotated[
        str | None, typer.Option("--after", metavar="TEXT", help="Let the adapters wake up where this has appeared.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="The longest answer, in tokens.")] = 128,
    temperature: Annotated[float, typer.Option("--temperature", help="0 is greedy.")] = 0.7,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", min=0, max=2**63 - 1, help="Makes the answer repeatable; a new one each time if left out."
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show the base, each register alone and the composition side by side.")
    ] = False,
    as_json: options.Json = False,
) -> None:
    """Let a weighted composition of registers speak."""
    request = ComposeRequest.checked(
        options.composition_of(specs),
        options.piped() if prompt is None else prompt,
        base=base,
        precision=precision,
        device=device,
        scene=scene,
        after=after,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        needs_prompt=compare or as_json,
    )
    if request.prompt is None:
        from lora_rt.core.cli.compose.chat import chat

        chat(request)
    elif compare:
        from lora_rt.core.cli.compose.compare import compare_answers

        compare_answers(request, as_json=as_json)
    else:
        from lora_rt.core.cli.compose.answer import answer

        answer(request, as_json=as_json)
