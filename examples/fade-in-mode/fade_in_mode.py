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

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_rt.plugins.contract import (
    IGNORE,
    Encoded,
    Example,
    Gate,
    GateContext,
    LoraRtError,
    Objective,
    ObjectiveContext,
    hookimpl,
    read_options,
)

if TYPE_CHECKING:
    from torch import Tensor, nn

LORA_RT_API = 1
MODE = "fade-in"
STATE = {"tokens": "I64", "start": "F32"}  # mode.safetensors as an adapter's card describes it: two numbers


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


class SceneToText(Objective):
    """Cross entropy of the text's tokens, given the scene; the state is the fade, which is not trained."""

    def __init__(self, context: ObjectiveContext, fade: Fade) -> None:
        self.context = context
        self.state = _as_state(fade)

    def encode(self, example: Example) -> list[Encoded]:
        """One sequence: prompt(scene) + text, loss on the text alone."""
        prompt = self.context.prompt_ids(example["scene"])
        answer = self.context.answer_ids(example["text"])
        return [Encoded(input_ids=[*prompt, *answer], labels=[IGNORE] * len(prompt) + answer)]


def _as_state(fade: Fade) -> nn.Module:
    from torch import nn

    state = nn.Module()
    for name, tensor in fade.tensors().items():
        state.register_buffer(name, tensor)
    return state


@hookimpl
def lora_rt_objective(context: ObjectiveContext) -> Objective:
    """Train like output-only, and keep the fade with the adapter."""
    return SceneToText(context, read_options(context.options, Fade))


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
def lora_rt_commands(app: typer.Typer) -> None:
    """`lora-rt fade-in ADAPTER OUT`."""
    app.command(MODE)(fade_in)


def fade_in(
    adapter: Annotated[Path, typer.Argument(help="The folder of an adapter that output-only trained.")],
    out: Annotated[Path, typer.Argument(help="A new folder, for the copy that fades in.")],
    tokens: Annotated[int, typer.Option(help="How many tokens the fade takes.")] = Fade.tokens,
    start: Annotated[float, typer.Option(help="The gate at the beginning of the answer, 0 to 1.")] = Fade.start,
) -> None:
    """Copy an adapter into one that fades in: no training, the same weights."""
    from safetensors.torch import save_file

    fade = read_options({"tokens": str(tokens), "start": str(start)}, Fade)
    card = _card(adapter)
    if out.exists():
        raise LoraRtError(f"{out} is there already", next_step="Give a new folder")
    shutil.copytree(adapter, out)
    save_file(fade.tensors(), out / "mode.safetensors")
    card |= {"mode": MODE, "state": {name: {"dtype": kind, "shape": []} for name, kind in STATE.items()}}
    (out / "register.json").write_text(json.dumps(card, ensure_ascii=False, indent=2), encoding="utf-8")
    typer.echo(f"{out} fades in over {tokens} tokens. Try it: lora-rt compose {out.absolute()}")


def _card(adapter: Path) -> dict[str, object]:
    try:
        card = json.loads((adapter / "register.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LoraRtError(f"{adapter} has no register.json", next_step="Give the folder of an adapter") from error
    except ValueError as error:
        raise LoraRtError(f"{adapter}/register.json is not JSON: {error}", next_step="Check the folder") from error
    if not isinstance(card, dict) or card.get("mode") not in ("output-only", MODE):
        raise LoraRtError(f"{adapter} has another mode, with its own gate", next_step="Give an output-only adapter")
    return card
