"""Sampling settings, greedy unless told otherwise, and one seed per row.

Imports no torch: a command checks them before it loads anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, SupportsIndex

from lora_rt.core.generation.numbers import of_other_kinds, whole
from lora_rt.errors import LoraRtError

COLDEST = 1e-4  # below it, dividing by the temperature leaves the range of float32, and the best token always wins
_LARGEST_SEED = 2**63 - 1
_KINDS = {
    "a number": ("temperature", "top_p", "repetition_penalty"),
    "a whole number": ("top_k", "max_new_tokens", "min_new_tokens"),
}
Seeds = SupportsIndex | None | Sequence[SupportsIndex | None]
"""One seed for all rows or one per row, of any type of whole number; None is a new one each time."""


class SamplingError(LoraRtError):
    """Sampling settings that make no sense."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Greedy unless `temperature` says otherwise: at None or 0 the most likely token is taken.

    `repetition_penalty` (Keskar et al. 2019, CTRL) counts the answer's own tokens only: the prompt's words are the ones
    that an answer about a scene should use. `top_p` is Holtzman et al.'s nucleus. At a text of `stop` the answer ends,
    before that text.
    """

    temperature: float | None = None
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 256
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()

    @classmethod
    def given(cls, *, stop: Sequence[str] | str = (), **settings: Any) -> Sampling:
        """The settings that a caller gives by name, checked; a single text is a `stop` too.

        Raises:
            SamplingError: as `check`.
        """
        texts: Any = tuple(stop) if isinstance(stop, Iterable) and not isinstance(stop, (str, bytes)) else (stop,)
        chosen = cls(stop=texts, **settings)
        chosen.check()
        return chosen

    def check(self) -> None:
        """Raises SamplingError with everything that is not a number or out of range."""
        if problems := of_other_kinds(self, _KINDS, optional=("temperature",)):
            raise SamplingError("; ".join(problems), problems=problems, next_step="See: lora-rt compose --help")
        if self.temperature is not None and not 0 <= self.temperature < 100:
            problems.append(f"temperature is {self.temperature}; it must be from 0 (greedy) to below 100")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k < 0:
            problems.append(f"top_k is {self.top_k}; it must be 0 (off) or more")
        if not 0 < self.repetition_penalty < 100:
            problems.append(
                f"repetition_penalty is {self.repetition_penalty}; it must be above 0 and below 100, and 1 is off"
            )
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0 <= self.min_new_tokens <= max(self.max_new_tokens, 0):
            problems.append(f"min_new_tokens is {self.min_new_tokens}; it must be from 0 to max_new_tokens")
        if isinstance(self.stop, str) or not all(isinstance(text, str) and text for text in self.stop):
            problems.append(f"stop is {self.stop!r}; it must be a list of texts")
        if problems:
            raise SamplingError("; ".join(problems), problems=problems, next_step="See: lora-rt compose --help")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature is None or self.temperature < COLDEST


def seeds_per_row(seed: Seeds, rows: int) -> list[int | None]:
    """One seed per row; a single one stands for all of them. Whole numbers of any type will do, numpy's too.

    Raises:
        SamplingError: a list of another length, or what is not a seed.
    """
    single = seed is None or isinstance(seed, str) or whole(seed) is not None or not hasattr(seed, "__len__")
    seeds: list[Any] = [seed] * rows if single else list(seed)  # type: ignore[arg-type]  # it has a length
    if len(seeds) != rows:
        raise SamplingError(f"{len(seeds)} seeds for {rows} rows", next_step="Give one for all, or one per row")
    found = [None if one is None else whole(one) for one in seeds]
    bad = [one for one, number in zip(seeds, found, strict=True) if one is not None and not _is_seed(number)]
    if bad:
        text = f"{bad[0]!r} is not a seed"
        raise SamplingError(text, next_step=f"Use a whole number from 0 to {_LARGEST_SEED}, or leave it out")
    return found


def _is_seed(number: int | None) -> bool:
    return number is not None and 0 <= number <= _LARGEST_SEED
