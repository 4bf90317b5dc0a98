"""Rows of a batch that are only read: the logits of all their tokens, and how likely answers are, in nats per token.

Such rows may be a caller's own tensors, which are checked first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lora_rt.core.forward.causal_lm import CausalLM
from lora_rt.core.generation.batch import Batch
from lora_rt.core.generation.row import Planner, R, check_lengths
from lora_rt.errors import LoraRtError


def whole_logits(lm: CausalLM, planner: Planner[R], rows: Sequence[R], mask: Tensor) -> Tensor:
    """The logits of whole rows, (rows, tokens, vocab), where the mask (rows, tokens) has their tokens; 0 on padding.

    A row may be padding alone, but not all of them.

    Raises:
        LengthError: a row is longer than the model's context.
    """
    there = [(number, row) for number, row in enumerate(rows) if row.length]
    found = _read(lm, planner, [row for _, row in there], [range(row.length) for _, row in there])
    logits = found[0].new_zeros(*mask.shape, found[0].shape[-1])
    for (number, _), own in zip(there, found, strict=True):
        logits[number, mask[number].bool()] = own  # (tokens of the row, vocab)
    return logits


def answer_nll(lm: CausalLM, planner: Planner[R], rows: Sequence[R], answers: Sequence[Sequence[int]]) -> list[Tensor]:
    """The negative log-likelihood of each answer token given its prompt and what stands before it.

    Args:
        rows: prompt and answer of each, the prompt's length given (see `DecodingRow`).
        answers: the last tokens of each row, at least one.

    Returns:
        One float32 tensor (answer tokens,) per row.

    Raises:
        LengthError: a row is longer than the model's context.
    """
    # What predicts a token stands one place before it.
    places = [range(row.length - len(answer) - 1, row.length - 1) for row, answer in zip(rows, answers, strict=True)]
    return [_nll(own, answer) for own, answer in zip(_read(lm, planner, rows, places), answers, strict=True)]


def choices_nll(
    lm: CausalLM, planner: Planner[R], prompt: R, rows: Sequence[R], answers: Sequence[Sequence[int]]
) -> list[Tensor]:
    """`answer_nll` of several answers to one prompt, which is read once.

    Args:
        prompt: the row of the prompt alone. rows: prompt and answer of each. answers: the last tokens of each row.
    """
    start = prompt.length
    for row in rows:
        row.wanted = range(start, row.length - 1)  # said now: a row that is only read may fill the context
    check_lengths(rows, lm.capacity)
    alike = {(lm.rope.factors(row.length), row.company) for row in (prompt, *rows)}
    if lm.keeping != "shared" or len(alike) > 1:  # the prompt's keys are not those of the whole rows
        return answer_nll(lm, planner, rows, answers)
    caches: list[Any] = []
    (first,) = _read(lm, planner, [prompt], [range(start - 1, start)], lambda _row, cache: caches.append(cache))
    going_on = [row for row in rows if row.length > start + 1]
    for row in going_on:
        row.begin = caches[0], start
    rest = iter(_read(lm, planner, going_on, [range(start, row.length - 1) for row in going_on]))
    own = [torch.cat([first, next(rest)]) if len(answer) > 1 else first for answer in answers]  # (answer, vocab) each
    return [_nll(one, answer) for one, answer in zip(own, answers, strict=True)]


def _read(
    lm: CausalLM,
    planner: Planner[R],
    rows: Sequence[R],
    places: Sequence[range],
    keep: Callable[[R, Any], None] | None = None,
) -> list[Tensor]:
    """The logits of each row at its places, (places, vocab), by a batch of rows that are only read."""
    for row, wanted in zip(rows, places, strict=True):
        row.wanted = wanted
    batch = Batch(lm, planner, keep=keep)
    batch.add(rows)
    batch.step()
    return [row.logits for row in rows if row.logits is not None]


def _nll(logits: Tensor, answer: Sequence[int]) -> Tensor:
    """The cross entropy of each token of an answer, (answer tokens,) float32, by its logits (answer tokens, vocab)."""
    with torch.inference_mode():
        wanted = torch.tensor(answer, device=logits.device)
        return cross_entropy(logits.float(), wanted, reduction="none").cpu()


class BatchError(LoraRtError):
    """Token ids or a mask that the model can't be given."""


def given_ids(input_ids: Any, vocab_size: int) -> list[list[int]]:
    """A caller's token ids, those of each row, as lists.

    Raises:
        BatchError: a row is not a list of this model's token ids; all such rows are named.
    """
    rows = [row.tolist() if hasattr(row, "tolist") else row for row in input_ids]
    problems = []
    for number, row in enumerate(rows):
        if not isinstance(row, Sequence) or not row or not all(_is_token(one, vocab_size) for one in row):
            problems.append(f"row {number}: {str(row)[:40]}")
    if problems:
        step = f"Give each row as a list of whole numbers from 0 to {vocab_size - 1}"
        raise BatchError("input_ids holds rows that are not token ids of this base", problems=problems, next_step=step)
    return rows


def _is_token(one: Any, vocab_size: int) -> bool:
    return isinstance(one, Integral) and not isinstance(one, bool) and 0 <= int(one) < vocab_size


def given_batch(input_ids: Any, attention_mask: Any, vocab_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """A caller's token ids and attention mask as tensors, both (rows, tokens) int64; no mask means no padding.

    Raises:
        BatchError: another shape, a number that is not a token id of this model, or nothing but padding.
    """
    try:
        ids = torch.as_tensor(input_ids, device=device)
        mask = torch.ones_like(ids) if attention_mask is None else torch.as_tensor(attention_mask, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BatchError(
            f"input_ids or attention_mask is not a tensor: {error}", next_step="Give (batch, tokens)"
        ) from error
    if ids.dim() != 2 or 0 in ids.shape:
        raise BatchError(f"input_ids has shape {tuple(ids.shape)}", next_step="Give (batch, tokens)")
    if mask.shape != ids.shape:
        text = f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}"
        raise BatchError(text, next_step="Give them the same shape")
    if not bool(mask.any()):
        raise BatchError("attention_mask hides every token", next_step="Give 1 where a token is to be read")
    if ids.is_floating_point() or bool(((ids < 0) | (ids >= vocab_size)).any()):
        text = "input_ids holds numbers that are not token ids of this base"
        raise BatchError(text, next_step=f"Give whole numbers from 0 to {vocab_size - 1}")
    return ids.long(), mask.long()
