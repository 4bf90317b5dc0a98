"""Rotary embeddings whose factors depend on the length of the text.

transformers picks such factors once per forward pass, from the longest row of the batch, and keeps them in the module:

    longrope   (Phi-3.5, Phi-4-mini): a short set up to the original context, a long one beyond it
    dynamic    (NTK): one set up to the original context, beyond it another one for every length

So rows may share a pass only where they get the same factors, and passes of several threads follow one another.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True, slots=True)
class _Switch:
    """Beyond `length` tokens the factors are others; `each`: others for every length (dynamic)."""

    length: int
    each: bool


class Rope:
    """What the rotary embeddings of one configuration make of lengths. Most models have nothing to switch."""

    def __init__(self, config: Any) -> None:
        self._switches = tuple(dict.fromkeys(_switches(config)))

    @property
    def varies(self) -> bool:
        """Whether the factors depend on the length at all."""
        return bool(self._switches)

    def factors(self, length: int) -> Hashable:
        """Equal for two lengths whose rows get the same factors."""
        return tuple(length if s.each and length > s.length else length > s.length for s in self._switches)

    def reread(self, before: int, now: int) -> bool:
        """Whether a row that has grown to `now` tokens is read again: its keys have the other set of factors.

        As transformers' own `generate` does it: longrope starts anew beyond its switch, dynamic keeps what it has.
        """
        return any(not s.each and before <= s.length < now for s in self._switches)


def _switches(config: Any) -> Iterator[_Switch]:
    """Of every set of rope parameters of a model; some have one per type of layer, some per sub-model."""
    text = config.get_text_config(decoder=True)
    parameters = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    for found in [parameters, *parameters.values()]:
        kind = found.get("rope_type", found.get("type")) if isinstance(found, Mapping) else None
        if not isinstance(kind, str):
            continue
        original = "original_max_position_embeddings"  # the context before scaling
        if kind == "longrope" and (before := found.get(original) or getattr(text, original, None)):
            yield _Switch(int(before), each=False)
        elif "dynamic" in kind and (limit := getattr(text, "max_position_embeddings", None)):
            yield _Switch(int(limit), each=True)


def forget_growth(model: nn.Module) -> None:
    """Let dynamic factors be those of the next pass alone, whatever passes have been before it."""
    each: Iterable[Any] = model.modules()
    for module in each:
        original = getattr(module, "original_max_seq_len", None)
        if original is None or not hasattr(module, "original_inv_freq"):
            continue
        if getattr(module, "max_seq_len_cached", original) != original:
            module.max_seq_len_cached = original
            module.register_buffer("inv_freq", module.original_inv_freq.clone(), persistent=False)
