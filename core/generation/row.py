"""One row of a batch: its tokens, how they are chosen, what it has said, and what a pass tells of it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from lora_rt.core.base.shape import positions_of
from lora_rt.core.engine.plan import Plan
from lora_rt.core.generation.choosing import RowSampler
from lora_rt.core.generation.lengths import LengthError as LengthError
from lora_rt.core.generation.sampling import Sampling, SamplingError

Ending = Literal["end", "stop", "length", "context", "error", "read"]
"""The end of the turn, a stop text, `max_new_tokens`, the model's context, no number in the output, or only read."""


@dataclass(frozen=True, slots=True)
class TokenScore:
    """A token of an answer, the natural logarithm of its chance, and those of the likeliest ones in its place.

    By the model's own scores: before temperature, penalties and the nucleus.
    """

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...] = ()

    @classmethod
    def of(cls, logprobs: Tensor, token: int, many: int) -> TokenScore:
        """From the row's (vocabulary,)."""
        values, tokens = logprobs.topk(min(many, len(logprobs)))
        return cls(token, float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))


class DecodingRow:
    """One row: the tokens of its prompt, how its tokens are chosen, and what it has said so far.

    Args:
        ids: the tokens that are given.
        sampling, seed: its own; without a seed every run is another one.
        prompt_length: how many of the ids are the prompt; all where left out.
    """

    def __init__(
        self,
        ids: Sequence[int],
        sampling: Sampling | None = None,
        seed: int | None = None,
        prompt_length: int | None = None,
    ) -> None:
        self.ids = list(ids)
        self.prompt_length = len(self.ids) if prompt_length is None else prompt_length
        self.sampling = sampling or Sampling()
        self.sampler = RowSampler(self.sampling, seed)
        self.answer: list[int] = []
        self.ended: Ending | None = None
        self.read = 0  # tokens whose keys and values lie in a cache; the next pass begins behind them
        self.begin: tuple[Any, int] | None = None  # a cache of its first tokens, and how many; not read again
        self.likely: int | None = None  # how many of the likeliest tokens are noted at each step; None notes nothing
        self.scores: list[TokenScore] = []  # one per token of the answer, where they are noted
        # The places of given tokens whose logits are wanted: such a row is only read, and says nothing.
        self.wanted: range | None = None
        self.logits: Tensor | None = None  # (wanted, vocab), once it was read

    @property
    def length(self) -> int:
        """How many tokens it has, the answer's included."""
        return len(self.ids) + len(self.answer)

    @property
    def company(self) -> Hashable:
        """Rows share a pass only where this is equal: layers that can't tell rows apart need them under one plan."""
        return None

    def hear(self, token: int) -> bool:
        """Told of each token of the answer; true where it completes a text at which the row stops."""
        return False


@dataclass(frozen=True, slots=True)
class PassInfo:
    """What a plan may depend on.

    `ids` and `positions` (rows, tokens) are this pass's, `history` and `mask` (rows, all tokens) those of all so far.
    """

    ids: Tensor
    positions: Tensor
    history: Tensor
    mask: Tensor
    prompt_lengths: Tensor

    @classmethod
    def of(cls, rows: Sequence[DecodingRow], history: Tensor, mask: Tensor, start: int = 0) -> PassInfo:
        """The pass that reads the columns from `start` on."""
        prompts = torch.tensor([row.prompt_length for row in rows], device=history.device)
        return cls(history[:, start:], positions_of(mask)[:, start:], history, mask, prompts)


R = TypeVar("R", bound=DecodingRow)

Planner = Callable[[PassInfo, Sequence[R]], Plan | None]
"""The plan of a pass over these rows; None is the base alone."""


def check_lengths(rows: Sequence[DecodingRow], capacity: int) -> None:
    """Raises LengthError that names every row that is too long, or leaves no room for the first token that it says."""
    long = [(number, row) for number, row in enumerate(rows) if row.length + (row.wanted is None) > capacity]
    if long:
        problems = [f"row {number}: {row.length} tokens" for number, row in long]
        speaks = any(row.wanted is None for _, row in long)
        too_long = "a prompt leaves no room for an answer in" if speaks else "a row is too long for"
        text = f"{too_long} this base's context of {capacity} tokens"
        raise LengthError(text, problems=problems, next_step="Shorten the prompt or the conversation")


def check_numbers(rows: Sequence[DecodingRow]) -> None:
    """Raises SamplingError that names every row that has ended because its output is not a number any more."""
    broken = [str(number) for number, row in enumerate(rows) if row.ended == "error"]
    if broken:
        text = f"the model's output is not a number any more (row {', '.join(broken)})"
        raise SamplingError(text, next_step="Use smaller weights, or a precision with more range")
