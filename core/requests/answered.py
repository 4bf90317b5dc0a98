"""What was answered, by whom: the document of one answer or of several beside one another, whoever asked for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_rt.plugins.contract import BaseFacts


@dataclass(frozen=True, slots=True)
class AdapterOrigin:
    """An adapter that speaks, and where it came from."""

    name: str
    mode: str
    source: str
    revision: str | None
    sha256: str

    def term(self, weight: float) -> dict[str, Any]:
        """The JSON form of the adapter as a term of an answer."""
        return {
            "name": self.name,
            "weight": weight,
            "mode": self.mode,
            "source": self.source,
            "revision": self.revision,
            "sha256": self.sha256,
        }


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer: the adapters that spoke with their weights, how many tokens they said, in how many seconds."""

    prompt: str
    text: str
    base: BaseFacts
    seed: int
    terms: Sequence[tuple[AdapterOrigin, float]]
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


@dataclass(frozen=True, slots=True)
class Comparison:
    """Answers to one prompt side by side: of each column the composition, "base" for none, and the text."""

    prompt: str
    columns: Sequence[tuple[str, str]]

    def document(self) -> dict[str, Any]:
        """The JSON form (see the public contract)."""
        return {"prompt": self.prompt, "columns": [{"spec": spec, "text": text} for spec, text in self.columns]}
