"""The decoding loop: one forward pass a step for all rows, each under its own composition.

Knows models, plans and tokens; knows nothing of prompts, compositions' texts or files.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_rt.core.engine.plan import Plan
from lora_rt.core.generation.batch import pad_left, positions_of
from lora_rt.core.generation.choosing import Chooser
from lora_rt.core.generation.sampling import Sampling
from lora_rt.errors import LoraRtError


class LengthError(LoraRtError):
    """More tokens than the model's context holds."""


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


Planner = Callable[[PassInfo], Plan | None]


class Decoder:
    """Decodes over one model."""

    def __init__(self, model: Any, pad_id: int, end_ids: Sequence[int]) -> None:
        self._model = model
        self._pad_id = pad_id
        self._end_ids = list(end_ids)
        self._parameters = inspect.signature(model.forward).parameters
        self._capacity = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize

    def logits(self, ids: Tensor, mask: Tensor, planner: Planner, columns: Tensor | None = None) -> Tensor:
        """The logits of whole rows, (rows, tokens, vocab); ids and mask (rows, tokens), padded on either side.

        With `columns` (n,) those of these positions alone, (rows, n, vocab).

        Raises:
            LengthError: a row is longer than the model's context.
        """
        with torch.inference_mode():
            lengths = mask.sum(-1)
            self._check_lengths(lengths.tolist(), self._capacity)
            info = PassInfo(ids, positions_of(mask), ids, mask, lengths)
            logits: Tensor = self._forward(info, planner, cache=None, keep=columns).logits
        return logits if columns is None or "logits_to_keep" in self._parameters else logits[:, columns]

    def decode(
        self, prompts: Sequence[Sequence[int]], planner: Planner, sampling: Sampling, seeds: Sequence[int | None]
    ) -> Iterator[list[int | None]]:
        """Yields one token per row and step, None for a row that has ended; the end-of-turn token is not yielded.

        A row also ends where the model's context does.

        Raises:
            LengthError: a prompt leaves no room for an answer.
        """
        from transformers import DynamicCache

        lengths = [len(prompt) for prompt in prompts]
        self._check_lengths(lengths, self._capacity - 1)
        chooser = Chooser(sampling, seeds, self._end_ids)
        ids, mask = pad_left(prompts, self._pad_id, self._model.device)
        prompt_lengths = mask.sum(-1)
        info = PassInfo(ids, positions_of(mask), ids, mask, prompt_lengths)
        cache = DynamicCache(config=self._model.config)
        answers: list[list[int]] = [[] for _ in prompts]
        open_rows = set(range(len(prompts)))
        for step in range(sampling.max_new_tokens):
            with torch.inference_mode():
                logits = self._forward(info, planner, cache=cache, keep=1).logits[:, -1]
                chosen = chooser.choose(logits, answers)
            open_rows -= {row for row in open_rows if chosen[row] in self._end_ids}
            for row in open_rows:
                answers[row].append(chosen[row])
            if open_rows:
                yield [chosen[row] if row in open_rows else None for row in range(len(prompts))]
            open_rows -= {row for row in open_rows if lengths[row] + len(answers[row]) >= self._capacity}
            if not open_rows or step + 1 == sampling.max_new_tokens:
                return
            info = self._next(info, chosen)

    def continuations(
        self, prompt: Sequence[int], answers: Tensor, mask: Tensor, planners: tuple[Planner, Planner]
    ) -> Tensor:
        """The logits that stand before each token of several answers to one prompt, which is read once.

        Args:
            prompt: token ids.
            answers, mask: (answers, tokens), padded on the right.
            planners: of the prompt alone, one row, and of the answers, one row each.

        Returns:
            (answers, tokens, vocab).

        Raises:
            LengthError: prompt and answers are longer than the model's context.
        """
        from transformers import DynamicCache

        rows, start = len(answers), len(prompt)
        self._check_lengths((start + mask.sum(-1)).tolist(), self._capacity)
        ids = torch.tensor([list(prompt)], device=answers.device)
        lengths = torch.full((rows,), start, device=answers.device)
        cache = DynamicCache(config=self._model.config)
        with torch.inference_mode():
            seen = torch.ones_like(ids)
            read = PassInfo(ids, positions_of(seen), ids, seen, lengths[:1])
            first = self._forward(read, planners[0], cache=cache, keep=1).logits[:, -1:]
            cache.batch_repeat_interleave(rows)
            seen = torch.cat([seen.expand(rows, -1), mask], dim=1)
            history = torch.cat([ids.expand(rows, -1), answers], dim=1)
            info = PassInfo(answers, positions_of(seen)[:, start:], history, seen, lengths)
            rest = self._forward(info, planners[1], cache=cache, keep=None).logits[:, :-1]
        return torch.cat([first.expand(rows, -1, -1), rest], dim=1)

    def _next(self, info: PassInfo, chosen: Sequence[int]) -> PassInfo:
        ids = torch.tensor(chosen, device=info.ids.device)[:, None]
        mask = torch.cat([info.mask, torch.ones_like(ids)], dim=1)
        history = torch.cat([info.history, ids], dim=1)
        positions = (info.positions[:, -1:] + 1).clamp(max=self._capacity - 1)  # rows that have ended go on, unheard
        return PassInfo(ids, positions, history, mask, info.prompt_lengths)

    def _check_lengths(self, lengths: Sequence[int], limit: int) -> None:
        problems = [f"row {row}: {length} tokens" for row, length in enumerate(lengths) if length > limit]
        if problems:
            text = f"this base takes {self._capacity} tokens in all, and that is exceeded"
            raise LengthError(text, problems=problems, next_step="Shorten the prompt or the conversation")

    def _forward(self, info: PassInfo, planner: Planner, *, cache: Any, keep: int | Tensor | None) -> Any:
        arguments: dict[str, Any] = {"input_ids": info.ids, "use_cache": cache is not None}
        if cache is not None:
            arguments["past_key_values"] = cache
        if not bool(info.mask.all()) or "position_ids" not in self._parameters:
            # Left out where nothing is padded: the kernel without a mask is faster.
            arguments["attention_mask"] = info.mask
        if "position_ids" in self._parameters:
            arguments["position_ids"] = info.positions
        if keep is not None and "logits_to_keep" in self._parameters:
            arguments["logits_to_keep"] = keep
        plan = planner(info)
        rows, tokens = info.ids.shape
        with plan.running(rows, tokens, keep) if plan is not None else nullcontext():
            return self._model(**arguments)
