"""The two directions of a bridge, and the words by which a prompt says which one is meant.

Expanding takes the scene as it is, as an output-only adapter does, so that a bridge can be composed with the registers.
Compressing is asked for in words that every base has in its vocabulary. Training, gates and `lora_rt.HyperBridge` all
use these two functions.
"""

from __future__ import annotations

from typing import Literal

from lora_rt.plugins.contract import LoraRtError

Direction = Literal["expand", "compress"]
DIRECTIONS: tuple[Direction, Direction] = ("expand", "compress")

RESERVE = "reserve"
"""The tensor of mode.safetensors that says which share of the ranks is each direction's own."""
_ASK = "Compress into a scene:\n"


def prompt_for(direction: Direction, content: str) -> str:
    """The user message: `content` is a scene to expand, or a text to compress.

    Compressing the empty text asks for a scene without saying of what: the prior that the PMI score subtracts.

    Raises:
        LoraRtError: there is no such direction.
    """
    if direction not in DIRECTIONS:
        text = f"there is no direction {direction!r}"
        raise LoraRtError(text, next_step=f"Use one of: {', '.join(DIRECTIONS)}")
    return content if direction == "expand" else _ASK + content


def direction_of(prompt: str | None) -> Direction:
    """The direction that a prompt asks for; a prompt that is not known, or is a chat, counts as a scene."""
    return "compress" if prompt is not None and prompt.startswith(_ASK) else "expand"
