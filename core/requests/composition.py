"""Compositions: the text `emotion:0.7 logic:0.3` and what it means.

A term is `reference[:weight]`, the weight 1 if left out and any finite number otherwise; terms are separated by spaces,
`+` or `,`. Weights are absolute: nothing is normalised. `emotion logic:0.5[So:]` lets logic wake up where "So:" has
appeared in the prompt or the answer (see `lora_rt.core.requests.activation`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lora_rt.core.requests import activation
from lora_rt.errors import LoraRtError
from lora_rt.registry.reference import Reference

_SEPARATORS = " \t\r\n+,"
# A term ends at a separator, except that the sign of a number and of its exponent belong to the number.
_WEIGHT = r"[+-]?(?:[^\s+,\[]*[\d.][eE][+-]?\d+(?=[\s+,\[]|$)|[^\s+,\[]*)"
# In a path a bracket is a character like any other, unless it follows a weight.
_REFERENCE = r"[./~][^\s+,:]*|[^\s+,:\[]*"
_TERM = re.compile(
    rf"(?P<reference>{_REFERENCE})(?::(?P<weight>{_WEIGHT}))?(?P<after>{activation.BRACKET})?", re.DOTALL
)


class InvalidCompositionError(LoraRtError):
    """A text that is no composition; `problems` names every bad term."""


@dataclass(frozen=True, slots=True)
class Term:
    """One adapter of a composition and its weight; with `after`, it is 0 until that text has appeared."""

    reference: Reference
    weight: float = 1.0
    after: str | None = None

    def __str__(self) -> str:
        plain = self.weight == 1 and not (self.after and self.reference.kind == "path")
        text = self.reference.text if plain else f"{self.reference.text}:{self.weight:.12g}"
        return text + activation.written(self.after)


@dataclass(frozen=True, slots=True)
class Composition:
    """Weighted terms in the order they were given. `str()` of a parsed one gives its text back."""

    terms: tuple[Term, ...]
    text: str = field(default="", compare=False)

    @classmethod
    def parse(cls, text: str) -> Composition:
        """Parse a composition.

        Raises:
            InvalidCompositionError: listing every bad term; also where there is none.
        """
        terms: list[Term] = []
        problems: list[str] = []
        for piece, reference, weight, after in _pieces(text):
            try:
                terms.append(_term(reference, weight, after))
            except LoraRtError as error:
                problems.append(f"{piece!r}: {error.message}")
        if not terms and not problems:
            problems.append("it has no terms")
        if problems:
            raise InvalidCompositionError(
                f"{text.strip()[:200]!r} is no composition: {'; '.join(problems)}",
                next_step="Write terms as name:weight, for instance: emotion:0.7 logic:0.3",
            )
        return cls(tuple(terms), text.strip())

    @classmethod
    def of(cls, value: Composition | str | Sequence[Term] | None) -> Composition | None:
        """A composition from any of the forms that the public functions take; None stays None (the base alone)."""
        if value is None or isinstance(value, Composition):
            return value
        if isinstance(value, str):
            return cls.parse(value)
        return cls(tuple(value))

    def waking(self, after: str) -> Composition:
        """The same, with every term asleep until the text has appeared, but those that wait for one of their own."""
        return Composition(tuple(replace(term, after=term.after or after) for term in self.terms))

    def __str__(self) -> str:
        return self.text or " ".join(str(term) for term in self.terms)


def _pieces(text: str) -> list[tuple[str, str, str | None, str | None]]:
    """(whole piece, reference, weight text or None, bracket or None) of every term."""
    found = []
    position = 0
    while position < len(text):
        if text[position] in _SEPARATORS:
            position += 1
            continue
        match = _TERM.match(text, position)
        assert match is not None  # the pattern matches the empty string
        end = max(match.end(), position + 1)
        found.append((text[position:end], match["reference"], match["weight"], match["after"]))
        position = end
    return found


def _term(reference: str, weight: str | None, after: str | None) -> Term:
    if not reference:
        raise LoraRtError("no name stands before the colon" if weight is not None else "no name stands there")
    return Term(Reference.parse(reference), 1.0 if weight is None else _weight(weight), activation.read(after))


def _weight(text: str) -> float:
    if not text:
        raise LoraRtError("no weight follows the colon")
    try:
        value = float(text)
    except ValueError as error:
        raise LoraRtError(f"{text!r} is not a number") from error
    if "_" in text or not math.isfinite(value):
        raise LoraRtError(f"the weight {text} is not a finite number")
    return value
