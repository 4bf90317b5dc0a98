"""Compositions: the text `emotion:0.7 logic:0.3` and what it means.

A term is `reference[:weight]`, the weight 1 if left out and any finite number otherwise; terms are separated by blanks
of any kind, `+` or `,`. Weights are absolute: nothing is normalised. `emotion logic:0.5[So:]` lets logic wake up where
"So:" has appeared in the prompt or the answer (see `lora_rt.core.requests.activation`). A path that has a blank or
another separator in it stands in quotes: `"./My Adapters/mine":0.7`.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lora_rt.core.generation.numbers import real
from lora_rt.core.requests import activation
from lora_rt.errors import LoraRtError, UsageError
from lora_rt.registry.reference import Reference, is_path

_SEPARATOR = re.compile(r"[\s+,]+")
_MINUS = str.maketrans("\u2212\u2013\ufe63\uff0d", "----")  # as texts on pages have it, in front of a number
# A term ends at a separator, except that the sign of a number and of its exponent belong to the number.
_WEIGHT = r"[+-]?(?:[^\s+,\[]*[\d.][eE][+-]?\d+(?=[\s+,\[]|$)|[^\s+,\[]*)"
# In a path a bracket is a character like any other, unless it follows a weight.
_REFERENCE = r'"[^"\n]+"(?=[\s+,:\[]|$)|[./~][^\s+,:]*|[^\s+,:\[]*'
_NEEDS_QUOTES = re.compile(r"[\s+,:]")
# What follows a term and can't: a bracket that is empty or never closed, or a weight behind it.
_WRONG = rf"\[\]|\[.*|(?<=\]):{_WEIGHT}"
_TERM = re.compile(
    rf"(?P<reference>{_REFERENCE})(?::(?P<weight>{_WEIGHT}))?(?P<after>{activation.BRACKET})?(?P<wrong>{_WRONG})?",
    re.DOTALL,
)


class InvalidCompositionError(UsageError):
    """A text that is not a composition; `problems` names every bad term."""


@dataclass(frozen=True, slots=True)
class Term:
    """One adapter of a composition and its weight; with `after`, it is 0 until that text has appeared.

    A term of a named composition also has the name of that `composition`, the digest `sha256` of the adapter that its
    weights were tuned for, `layers`, factors of its weight by layer, where it differs between them, and `mode`, where
    that composition has one, which decides for its adapters at inference.
    """

    reference: Reference
    weight: float = 1.0
    after: str | None = None
    layers: tuple[float, ...] = ()
    sha256: str = ""
    composition: str = ""
    mode: str = ""

    def __post_init__(self) -> None:
        """
        Raises:
            InvalidCompositionError: the reference or the weight is none.
        """
        try:
            object.__setattr__(self, "reference", Reference.of(self.reference))
            object.__setattr__(self, "weight", _number(self.weight))
        except (LoraRtError, TypeError) as error:
            text = f"{self.reference!r:.200} with {self.weight!r:.80} is not a term: {getattr(error, 'message', error)}"
            raise InvalidCompositionError(text, next_step="Give a reference and a number") from error

    @property
    def mean_weight(self) -> float:
        """Its weight, averaged over the layers where it differs between them."""
        return self.weight * (sum(self.layers) / len(self.layers) if self.layers else 1.0)

    def __str__(self) -> str:
        plain = self.weight == 1 and not (self.after and self.reference.kind == "path")
        named = quoted(self.reference.text) if self.reference.kind == "path" else self.reference.text
        return (named if plain else f"{named}:{self.weight:.12g}") + activation.written(self.after)


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
        if not isinstance(text, str):
            wrong = f"{text!r:.200} is not a composition: it is a {type(text).__name__}"
            raise InvalidCompositionError(wrong, next_step="Write one, for instance: emotion:0.7 logic:0.3")
        terms: list[Term] = []
        problems: list[str] = []
        for piece in _pieces(text):
            try:
                terms.append(_term(piece))
            except LoraRtError as error:
                problem = error.message.removeprefix(f"{piece['reference'][:120]!r} is not a reference: ")
                problems.append(problem if piece[0] == text.strip() else f"{piece[0]!r}: {problem}")
        if not terms and not problems:
            problems.append("it has no terms")
        if problems:
            raise InvalidCompositionError(
                f"{text.strip()[:200]!r} is not a composition: {'; '.join(problems)}",
                next_step="Write terms as name:weight, for instance: emotion:0.7 logic:0.3",
            )
        return cls(tuple(terms), text.strip())

    @classmethod
    def of(cls, value: CompositionLike | None) -> Composition | None:
        """A composition from any of the forms that the public functions take; None stays None (the base alone).

        Raises:
            InvalidCompositionError: listing every bad term.
        """
        if value is None or isinstance(value, Composition):
            return value
        if isinstance(value, str):
            return cls.parse(value)
        if isinstance(value, Mapping):
            return _of_mapping(value)
        terms: tuple[Any, ...] = tuple(value) if isinstance(value, Sequence) else ()
        if not terms or not all(isinstance(term, Term) for term in terms):
            text = f"{value!r:.200} is not a composition"
            raise InvalidCompositionError(text, next_step='Give a text, or a mapping: {"emotion": 0.7, "logic": 0.3}')
        return cls(terms)

    def waking(self, after: str) -> Composition:
        """The same, with every term asleep until the text has appeared, but those that wait for one of their own."""
        return Composition(tuple(replace(term, after=term.after or after) for term in self.terms))

    @property
    def total(self) -> float:
        """The sum of |weight|; a named composition counts with the weight before its name."""
        return sum(abs(term.mean_weight) for term in self.terms)

    def normalized(self, limit: float, total: float | None = None) -> Composition:
        """The same mix with the sum of |weight| at most `limit`: itself, or all weights times one factor.

        Args:
            limit: above 0.
            total: what the weights add up to, where that is known better, as of named compositions.

        Raises:
            InvalidCompositionError: the limit is not a finite number above 0, or the weights add up to none.
        """
        if not 0 < (real(limit) or 0.0) < math.inf:
            text = f"a composition can't be normalized to {limit!r}"
            raise InvalidCompositionError(text, next_step="Give a number above 0, for instance 1")
        whole = self.total if total is None else total
        if whole <= limit:
            return self
        if whole == math.inf:
            text = f"{str(self)[:200]!r} can't be normalized: its weights add up to more than a number holds"
            raise InvalidCompositionError(text, next_step="Give smaller weights, for instance: emotion:0.7 logic:0.3")
        return Composition(tuple(replace(term, weight=term.weight * limit / whole) for term in self.terms))

    def __str__(self) -> str:
        return self.text or " ".join(str(term) for term in self.terms)


CompositionLike = Composition | str | Mapping[Any, float] | Sequence[Term]
"""What stands for one composition: parsed, as text, as a mapping from references to weights, or as terms."""


def quoted(path: str) -> str:
    """A path as it stands in the text of a composition: in quotes where it has a separator in it."""
    return f'"{path}"' if _NEEDS_QUOTES.search(path) and '"' not in path else path


def _of_mapping(weights: Mapping[Any, float]) -> Composition:
    """{"emotion": 0.7, "logic[So:]": 0.3}: references, or paths, and their weights."""
    terms: list[Term] = []
    problems: list[str] = []
    for key, weight in weights.items():
        try:
            terms.append(replace(_key(key), weight=_number(weight)))
        except LoraRtError as error:
            problems.append(f"{key!r}: {error.message}")
    if not terms and not problems:
        problems.append("it has no terms")
    if problems:
        text = f"{weights!r:.200} is not a composition: {'; '.join(problems)}"
        raise InvalidCompositionError(text, next_step='Write references and weights: {"emotion": 0.7, "logic": 0.3}')
    return Composition(tuple(terms))


def _key(key: Any) -> Term:
    """The term that a key of a mapping names; its weight stands beside it."""
    if isinstance(key, (Reference, os.PathLike)):
        return Term(Reference.of(key))
    if not isinstance(key, str):
        raise LoraRtError("it is not a reference")
    pieces = _pieces(key)
    if len(pieces) != 1 or pieces[0]["weight"] is not None:
        quotes = ", a path that has blanks in quotes" if is_path(key) and '"' not in key else ""
        raise LoraRtError(f"write one reference there{quotes}, and its weight as the value")
    return _term(pieces[0])


def _number(weight: Any) -> float:
    value = real(weight)
    if value is None:
        raise LoraRtError(f"the weight {weight!r:.80} is not a number")
    if not math.isfinite(value):
        raise LoraRtError(f"the weight {weight!r:.80} is not a finite number")
    return value


def _pieces(text: str) -> list[re.Match[str]]:
    """Every term's match, whose groups may be empty or None."""
    found = []
    position = 0
    while position < len(text):
        if separator := _SEPARATOR.match(text, position):
            position = separator.end()
            continue
        match = _TERM.match(text, position)
        assert match is not None
        assert match.end() > position  # some part of it takes any character
        found.append(match)
        position = match.end()
    return found


def _term(piece: re.Match[str]) -> Term:
    reference, weight, wrong = piece["reference"], piece["weight"], piece["wrong"]
    if not reference:
        raise LoraRtError("there is no name before the colon" if weight is not None else "there is no name")
    if wrong:
        raise LoraRtError(_why_not(wrong))
    if weight is not None and weight.endswith("]") and "[" in reference:  # a path's bracket, which is part of its name
        raise LoraRtError("a path needs its weight before the bracket, as in ./mine:1[So:]")
    if len(reference) > 2 and reference[0] == reference[-1] == '"':
        reference = reference[1:-1]
    return Term(Reference.parse(reference), 1.0 if weight is None else _weight(weight), activation.read(piece["after"]))


def _why_not(wrong: str) -> str:
    if wrong.startswith(":"):
        return "the weight comes before the bracket, as in logic:0.5[So:]"
    if wrong == "[]":
        return "the bracket is empty; it holds the text that wakes the adapter, as in logic:0.5[So:]"
    return "the bracket is not closed; it holds the text that wakes the adapter, as in logic:0.5[So:]"


def _weight(text: str) -> float:
    if not text:
        raise LoraRtError("no weight follows the colon")
    try:
        value = float(text.translate(_MINUS))
    except ValueError as error:
        raise LoraRtError(f"{text!r} is not a number") from error
    if "_" in text or not math.isfinite(value):
        raise LoraRtError(f"the weight {text} is not a finite number")
    return value


class RequestError(LoraRtError):
    """A request whose parts do not fit together."""


Compositions = CompositionLike | None | Sequence[CompositionLike | None]
"""One composition for all rows of a request, or a list of one per row."""


def per_row(value: Compositions, rows: int) -> list[Composition | None]:
    """One composition per row; a single one stands for all of them.

    Raises:
        RequestError: a list of another length.
        InvalidCompositionError: one that is not a composition.
    """
    given: Any = value
    single = given is None or isinstance(given, (str, Composition, Mapping)) or not isinstance(given, Sequence)
    if single or (given and all(isinstance(item, Term) for item in given)):
        return [Composition.of(given)] * rows
    if len(given) != rows:
        raise RequestError(f"{len(given)} compositions for {rows} rows", next_step="Give one for all, or one per row")
    return [Composition.of(item) for item in given]
