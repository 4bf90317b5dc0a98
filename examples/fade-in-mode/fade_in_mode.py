"""fade-in: a register that comes in gradually. The answer begins in the base's voice and ends in the adapter's.

At the first token of the answer the adapter's gate is `start`, after `tokens` tokens it is 1, and linear in between:

    gate
    1      .________
          /
         /
    start __/                 the prompt is read with `start`, too
      prompt | answer

It trains like output-only (scene -> text, loss on the text alone), with the adapter at full strength. The two options
are kept beside the adapter in mode.safetensors, so that whoever gets the adapter gets the fade with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_rt.plugins.contract import (
    AdapterView,
    Gate,
    GateContext,
    LoraRtError,
    Objective,
    ObjectiveContext,
    SceneToText,
    Services,
    hookimpl,
    read_options,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

LORA_RT_API = 1
MODE = "fade-in"


@dataclass(frozen=True)
class Fade:
    """`--option tokens=24`: how long the fade is. `--option start=0`: the gate at the beginning of the answer."""

    tokens: int = 24
    start: float = 0.0

    def __post_init__(self) -> None:
        if self.tokens < 1:
            raise ValueError(f"tokens is {self.tokens}; a fade has at least 1")
        if not 0 <= self.start <= 1:
            raise ValueError(f"start is {self.start}; it must be from 0 to 1")

    def tensors(self) -> dict[str, Tensor]:
        """The fade as it stands in mode.safetensors."""
        import torch

        return {"tokens": torch.tensor(self.tokens), "start": torch.tensor(self.start)}


def _as_state(fade: Fade) -> nn.Module:
    from torch import nn

    state = nn.Module()
    for name, tensor in fade.tensors().items():
        state.register_buffer(name, tensor)
    return state


@hookimpl
def lora_rt_objective(context: ObjectiveContext) -> Objective:
    """Train like output-only, and keep the fade with the adapter."""
    return SceneToText(context, _as_state(read_options(context.options, Fade)))


@hookimpl
def lora_rt_gate(context: GateContext) -> Gate:
    """One factor per row and token, the same for all layers and ranks."""
    tokens = float(context.state.get("tokens", Fade.tokens))
    start = float(context.state.get("start", Fade.start))
    # Position p predicts the token at p + 1: the answer's first token comes from the last one of the prompt.
    answered = context.positions - (context.prompt_lengths[:, None] - 1)  # (batch, tokens)
    progress = (answered / tokens).clamp(0, 1)
    return Gate(ranks=(start + (1 - start) * progress)[..., None])  # (batch, tokens, 1)


@hookimpl
def lora_rt_static(context: AdapterView) -> str:
    """Constant weights can't fade."""
    return "it fades in over the answer"


@hookimpl
def lora_rt_commands(app: typer.Typer, services: Services) -> None:
    """`lora-rt fade-in ADAPTER OUT`."""

    @app.command(MODE)
    def fade_in(
        adapter: Annotated[str, typer.Argument(help="An adapter that output-only trained: a name, or a folder.")],
        out: Annotated[Path, typer.Argument(help="A new folder, for the copy that fades in.")],
        tokens: Annotated[int, typer.Option(help="How many tokens the fade takes.")] = Fade.tokens,
        start: Annotated[float, typer.Option(help="The gate at the beginning of the answer, 0 to 1.")] = Fade.start,
    ) -> None:
        """Copy an adapter into one that fades in: no training, the same weights."""
        fade = read_options({"tokens": str(tokens), "start": str(start)}, Fade)
        source = services.adapter(adapter)
        if source.mode not in ("output-only", MODE):
            text = f"{source.name} has the mode {source.mode}, with a gate of its own"
            raise LoraRtError(text, next_step="Give an output-only adapter")
        services.copy_adapter(source, out, mode=MODE, state=fade.tensors())
        typer.echo(f"{out} fades in over {tokens} tokens. Try it: lora-rt compose {out.absolute()}")
