"""Passes over whole rows: the logits of all their tokens, and how likely given answers are, in nats per token.

Such rows may be a caller's own tensors, which are checked first.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lora_rt.core.base.shape import pad_right
from lora_rt.core.forward.causal_lm import CausalLM
from lora_rt.core.generation.row import DecodingRow, PassInfo, Planner, R, check_lengths
from lora_rt.errors import LoraRtError


def whole_logits(lm: CausalLM, planner: Planner[R], rows: Sequence[R], ids: Tensor, mask: Tensor) -> Tensor:
    """The logits of whole rows, (rows, tokens, vocab), where their tokens stand; padding may be on either side.

    Raises:
        LengthError: a row is longer than the model's context.
    """
    lengths = [row.length for row in rows]
    check_lengths(lengths, lm.capacity, lm.capacity)
    parts = _parts(lm, rows)
    gaps = not bool(mask.cummin(-1).values.eq(mask).all())  # padding that some token could see
    if len(parts) == 1 and not (gaps and not lm.ignores_padding):
        with torch.inference_mode():
            return _pass(lm, planner, rows, ids, mask)
    logits: Tensor | None = None
    for numbers in parts:
        own = [rows[number] for number in numbers]
        with torch.inference_mode():
            found = _pass(lm, planner, own, *pad_right([row.ids for row in own], lm.device))  # (own, tokens, vocab)
        if logits is None:
            logits = found.new_zeros(*ids.shape, found.shape[-1])  # (rows, tokens, vocab)
        for number, row in zip(numbers, found, strict=True):
            logits[number, mask[number].bool()] = row[: rows[number].length]  # (tokens of the row, vocab)
    assert logits is not None
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
    lengths = [row.length for row in rows]
    check_lengths(lengths, lm.capacity, lm.capacity)
    found: dict[int, Tensor] = {}
    for numbers in _parts(lm, rows):
        own = [rows[number] for number in numbers]
        starts = [row.length - len(answers[number]) - 1 for row, number in zip(own, numbers, strict=True)]
        ids, mask = pad_right([row.ids for row in own], lm.device)  # (own, tokens)
        columns = torch.arange(min(starts), ids.shape[1] - 1, device=lm.device)  # (columns,)
        with torch.inference_mode():
            logits = _pass(lm, planner, own, ids, mask, columns)  # (own, columns, vocab)
            losses = _losses(logits, ids[:, min(starts) + 1 :])  # (own, columns)
        for number, start, row in zip(numbers, starts, losses, strict=True):
            first = start - min(starts)
            found[number] = row[first : first + len(answers[number])].cpu()  # (answer tokens,)
    return [found[number] for number in range(len(rows))]


def choices_nll(
    lm: CausalLM, planner: Planner[R], prompt: R, rows: Sequence[R], answers: Sequence[Sequence[int]]
) -> list[Tensor]:
    """`answer_nll` of several answers to one prompt, which is read once.

    Args:
        prompt: the row of the prompt alone. rows: prompt and answer of each. answers: the last tokens of each row.
    """
    check_lengths([row.length for row in rows], lm.capacity, lm.capacity)
    if (
        lm.keeping != "shared" or len(_parts(lm, [prompt, *rows])) > 1
    ):  # the prompt's keys are not those of the whole rows
        return answer_nll(lm, planner, rows, answers)
    cache = lm.new_cache()
    start = prompt.length
    with torch.inference_mode():
        ids, seen = pad_right([prompt.ids], lm.device)  # (1, prompt)
        first = _pass(lm, planner, [prompt], ids, seen, keep=1, cache=cache)  # (1, 1, vocab)
        cache.batch_repeat_interleave(len(rows))
        wanted, mask = pad_right(answers, lm.device)  # (rows, answer)
        history = torch.cat([ids.expand(len(rows), -1), wanted], dim=1)  # (rows, prompt + answer)
        info = PassInfo.of(rows, history, torch.cat([seen.expand(len(rows), -1), mask], dim=1), start)
        plan = planner(info, rows)
        # (rows, answer - 1, vocab): what the last column predicts is not asked for
        rest = lm.forward(info.ids, info.mask, info.positions, plan=plan, cache=cache)[:, :-1]
        losses = _losses(torch.cat([first.expand(len(rows), -1, -1), rest], dim=1), wanted)  # (rows, answer)
    return [losses[number, : len(answer)].cpu() for number, answer in enumerate(answers)]


def _parts(lm: CausalLM, rows: Sequence[DecodingRow]) -> list[list[int]]:
    """The numbers of rows that may share a pass when they are padded on the right, which no token looks at."""
    found: dict[Hashable, list[int]] = {}
    for number, row in enumerate(rows):
        found.setdefault((lm.rope.factors(row.length), row.company), []).append(number)
    return list(found.values())


def _pass(
    lm: CausalLM,
    planner: Planner[R],
    rows: Sequence[R],
    ids: Tensor,
    mask: Tensor,
    keep: Tensor | int | None = None,
    cache: object = None,
) -> Tensor:
    """The logits of one pass over whole rows."""
    info = PassInfo.of(rows, ids, mask)
    return lm.forward(ids, mask, info.positions, plan=planner(info, rows), keep=keep, cache=cache)


def _losses(logits: Tensor, wanted: Tensor) -> Tensor:
    """The cross entropy of every token, (rows, tokens)."""
    return cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), reduction="none").view(wanted.shape)


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
        BatchError: another shape, or a number that is not a token id of this model.
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
    if ids.is_floating_point() or bool(((ids < 0) | (ids >= vocab_size)).any()):
        text = "input_ids holds numbers that are not token ids of this base"
        raise BatchError(text, next_step=f"Give whole numbers from 0 to {vocab_size - 1}")
    return ids.long(), mask.long()
