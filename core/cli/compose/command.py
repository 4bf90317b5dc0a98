"""The command and its options."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lora_rt.core.cli import options
from lora_rt.core.cli.compose.answer import answer
from lora_rt.core.cli.compose.chat import chat
from lora_rt.core.cli.compose.compare import compare_answers
from lora_rt.core.cli.compose.request import ComposeRequest, check_engine


@options.spread
def compose(
    specs: options.Specs,
    over: options.OverBase,
    prompt: Annotated[
        str | None,
        typer.Option("-p", "--prompt", help="The prompt. Left out: standard input, or a chat in a terminal."),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            "--engine", help="What runs the model: torch, or llama.cpp (faster for one answer; without gates)."
        ),
    ] = "torch",
    scene: options.Scene = None,
    normalize: options.Normalize = None,
    after: Annotated[
        str | None,
        typer.Option(
            "--after",
            metavar="TEXT",
            help="Let the adapters act only after this text has appeared, in prompt or answer.",
        ),
    ] = None,
    system: options.System = None,
    max_new_tokens: options.MaxNewTokens = 128,
    temperature: options.Temperature = 0.7,
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p",
            min=0,
            max=1,
            help="Draw among the likeliest tokens that make up this share of the probability; 0.9 if left out.",
        ),
    ] = None,
    top_k: options.TopK = 0,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(
            "--repetition-penalty",
            min=0,
            help="Make tokens that the answer has used less likely; if left out 1.1, or 1 (off) at temperature 0.",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", min=0, max=2**63 - 1, help="Makes the answer repeatable; a new one each time if left out."
        ),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show the base, each register alone and the composition side by side.")
    ] = False,
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic", help="With --compare, compute every answer by itself: it is then the one given alone."
        ),
    ] = False,
    multiply: options.Multiply = None,
    as_json: options.Json = False,
) -> None:
    """Answer a prompt with a weighted composition of registers, or chat with it."""
    given: dict[str, Any] = dict(locals())  # the settings of a request have the names of their options
    for name in ("specs", "over", "prompt", "compare", "deterministic", "multiply", "as_json"):
        del given[name]
    check_engine(engine, base=over.base, precision=over.precision, multiply=multiply, scene=scene, after=after)
    request = ComposeRequest.checked(
        options.composition_of(specs),
        options.piped() if prompt is None else prompt,
        needs_prompt=compare or as_json,
        base=over.base,
        precision=over.precision,
        device=over.device,
        template_var=over.template_var or [],
        special_tokens=over.special_tokens,
        **given,
    )
    if request.prompt is None:
        chat(request)
    elif compare:
        compare_answers(request, as_json=as_json, deterministic=deterministic)
    else:
        answer(request, as_json=as_json)
