"""How the next token is chosen: greedy, or sampled by a generator that belongs to the row alone."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lora_rt.core.generation.sampling import Sampling, SamplingError


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
