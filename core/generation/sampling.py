"""Sampling settings, greedy unless told otherwise, and one seed per row.

Imports no torch: a command checks them before it loads anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_rt.errors import LoraRtError

COLDEST = 1e-4  # below it, dividing by the temperature leaves the range of float32, and the best token always wins
_LARGEST_SEED = 2**63 - 1


class SamplingError(LoraRtError):
    """Sampling settings that make no sense."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """Greedy unless `temperature` says otherwise.

    `repetition_penalty` (Keskar et al. 2019, CTRL) counts the answer's own tokens only: the prompt's words are the ones
    that an answer about a scene should use. `top_p` is Holtzman et al.'s nucleus.
    """

    temperature: float | None = None
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    max_new_tokens: int = 256
    min_new_tokens: int = 0

    def check(self) -> None:
        """Raises SamplingError with everything that is out of range."""
        problems = []
        if self.temperature is not None and not 0 <= self.temperature < 100:
            problems.append(f"temperature is {self.temperature}; it must be from 0 (greedy) to below 100")
        if not 0 < self.top_p <= 1:
            problems.append(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if self.top_k < 0:
            problems.append(f"top_k is {self.top_k}; it must be 0 (off) or more")
        if not 0 < self.repetition_penalty < 100:
            problems.append(f"repetition_penalty is {self.repetition_penalty}; it must be above 0, and 1 is off")
        if self.max_new_tokens < 1:
            problems.append(f"max_new_tokens is {self.max_new_tokens}; it must be at least 1")
        if not 0 <= self.min_new_tokens <= max(self.max_new_tokens, 0):
            problems.append(f"min_new_tokens is {self.min_new_tokens}; it must be from 0 to max_new_tokens")
        if problems:
            raise SamplingError("; ".join(problems), problems=problems, next_step="See: lora-rt compose --help")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature is None or self.temperature < COLDEST


def seeds_per_row(seed: int | Sequence[int | None] | None, rows: int) -> list[int | None]:
    """One seed per row; a single one stands for all of them.

    Raises:
        SamplingError: a list of another length, or what is no seed.
    """
    seeds = [seed] * rows if seed is None or isinstance(seed, int) else list(seed)
    if len(seeds) != rows:
        raise SamplingError(f"{len(seeds)} seeds for {rows} rows", next_step="Give one for all, or one per row")
    bad = [s for s in seeds if s is not None and not (isinstance(s, int) and 0 <= s <= _LARGEST_SEED)]
    if bad:
        text = f"{bad[0]!r} is no seed"
        raise SamplingError(text, next_step=f"Use a whole number from 0 to {_LARGEST_SEED}, or leave it out")
    return seeds
