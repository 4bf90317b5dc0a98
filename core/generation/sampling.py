"""How the next token is chosen: greedy, or sampled by a generator that belongs to the row alone."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_rt.errors import LoraRtError

_COLDEST = 1e-4  # below it, dividing by the temperature leaves the range of float32, and the best token always wins
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
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            problems.append(f"min_new_tokens is {self.min_new_tokens}; it must be from 0 to max_new_tokens")
        if problems:
            raise SamplingError("these sampling settings can't be used", problems=problems, next_step="Correct them")

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature is None or self.temperature < _COLDEST


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
        raise SamplingError(text, next_step=f"Use a whole number from 0 to {_LARGEST_SEED}, or None")
    return seeds


class Chooser:
    """Chooses tokens for the rows of one batch.

    A row's choice depends on its own logits, answer and seed alone, so it is the same whatever stands beside it.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int | None], end_ids: Sequence[int]) -> None:
        from transformers.generation.logits_process import (
            RepetitionPenaltyLogitsProcessor,
            TemperatureLogitsWarper,
            TopKLogitsWarper,
            TopPLogitsWarper,
        )

        self._sampling = sampling
        self._end_ids = list(end_ids)
        self._generators = [torch.Generator().manual_seed(secrets.randbits(63) if s is None else s) for s in seeds]
        penalty = sampling.repetition_penalty
        self._penalty = RepetitionPenaltyLogitsProcessor(penalty) if penalty != 1.0 else None
        self._warpers: list[Any] = []
        if not sampling.greedy:
            self._warpers.append(TemperatureLogitsWarper(float(sampling.temperature or 1.0)))
            if sampling.top_k:
                self._warpers.append(TopKLogitsWarper(sampling.top_k))
            if sampling.top_p < 1:
                self._warpers.append(TopPLogitsWarper(sampling.top_p))

    def choose(self, logits: Tensor, answers: Sequence[Sequence[int]]) -> list[int]:
        """One token per row; logits (rows, vocab) of the last position, `answers` what each row has said so far.

        Raises:
            SamplingError: the logits of a row are not numbers.
        """
        scores = logits.float()
        if bool(scores.isnan().any()):
            rows = [str(row) for row, broken in enumerate(scores.isnan().any(-1).tolist()) if broken]
            text = f"the model's output is not a number any more (row {', '.join(rows)})"
            raise SamplingError(text, next_step="Use smaller weights, or a precision with more range")
        if self._penalty is None and self._sampling.greedy:
            return [int(i) for i in self._with_minimum(scores, answers).argmax(-1).tolist()]
        return [self._choose_row(row, scores[row : row + 1], answers) for row in range(len(answers))]

    def _choose_row(self, row: int, scores: Tensor, answers: Sequence[Sequence[int]]) -> int:
        said = torch.tensor([list(answers[row])], dtype=torch.long, device=scores.device)
        if self._penalty is not None and said.numel():
            scores = self._penalty(said, scores)
        scores = self._with_minimum(scores, [answers[row]])
        if self._sampling.greedy:
            return int(scores.argmax())
        for warper in self._warpers:
            scores = warper(said, scores)
        chances = torch.softmax(scores, -1).cpu()
        return int(torch.multinomial(chances, 1, generator=self._generators[row]))

    def _with_minimum(self, scores: Tensor, answers: Sequence[Sequence[int]]) -> Tensor:
        """Forbid the end of the turn to rows whose answer is still too short."""
        short = [row for row, answer in enumerate(answers) if len(answer) < self._sampling.min_new_tokens]
        if short:
            scores = scores.clone()
            for end in self._end_ids:
                scores[short, end] = -torch.inf
        return scores
