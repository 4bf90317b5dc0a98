"""A tokenizer alone: the tokens of an answer, and the text of an answer as it is streamed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_rt.core.generation.prompts import TextFormat
from lora_rt.core.generation.text import TextStream


def answer_ids(tokenizer: Any, text: str) -> list[int]:
    return TextFormat(tokenizer).answer_ids(text)


def text_of(tokenizer: Any, ids: Sequence[int]) -> str:
    stream = TextStream(tokenizer)
    return "".join([*(stream.push(token) for token in ids), stream.rest()])
