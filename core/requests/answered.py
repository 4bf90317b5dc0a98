"""What was answered, by whom: the document of one answer, whoever asked for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_rt.core.requests.residents import AdapterInfo
from lora_rt.plugins.contract import BaseFacts


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: the adapters that spoke with their weights, how many tokens they said, in how many seconds."""

    prompt: str
    text: str
    base: BaseFacts
    seed: int
    terms: Sequence[tuple[AdapterInfo, float]]
    tokens: int
    seconds: float

    def document(self) -> dict[str, Any]:
        """The JSON form (see the public contract)."""
        return {
            "prompt": self.prompt,
            "text": self.text,
            "base": self.base.id,
            "precision": self.base.precision,
            "seed": self.seed,
            "terms": [info.term(weight) for info, weight in self.terms],
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
        }
