"""The decoding loop: one forward pass a step for all rows, each under its own composition.

Knows models, plans and tokens; knows nothing of prompts, compositions' texts or files.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_rt.core.engine.plan import Plan
from lora_rt.core.generation.batch import pad_left, positions_of
from lora_rt.core.generation.sampling import Chooser, Sampling


@dataclass(frozen=True, slots=True)
class PassInfo:
    """What a plan may depend on: `ids` and `positions` (rows, tokens) of this pass, `history` all ids so far with `mask`."""

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

    def logits(self, ids: Tensor, mask: Tensor, planner: Planner, columns: Tensor | None = None) -> Tensor:
        """The logits of whole rows, (rows, tokens, vocab); ids and mask (rows, tokens), padded on either side.

        With `columns` (n,) those of these positions alone, (rows, n, vocab).
        """
        with torch.inference_mode():
            lengths = mask.sum(-1)
            info = PassInfo(ids, positions_of(mask), ids, mask, lengths)
            logits: Tensor = self._forward(info, planner, cache=None, keep=columns).logits
        return logits if columns is None or "logits_to_keep" in self._parameters else logits[:, columns]

    def decode(self, prompts: Sequence[Sequence[int]], planner: Planner, sampling: Sampling, seeds: Sequence[int | None]) -> Iterator[list[int | None]]:
        """Yields one token per row and step, None for a row that has ended; the end-of-turn token is not yielded."""
        from transformers import DynamicCache

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
            if not open_rows or step + 1 == sampling.max_new_tokens:
                return
            info = self._next(info, chosen)

    def _next(self, info: PassInfo, chosen: Sequence[int]) -> PassInfo:
        ids = torch.tensor(chosen, device=info.ids.device)[:, None]
        mask = torch.cat([info.mask, torch.ones_like(ids)], dim=1)
        history = torch.cat([info.history, ids], dim=1)
        return PassInfo(ids, info.positions[:, -1:] + 1, history, mask, info.prompt_lengths)

    def _forward(self, info: PassInfo, planner: Planner, *, cache: Any, keep: int | Tensor | None) -> Any:
        arguments: dict[str, Any] = {"input_ids": info.ids, "use_cache": cache is not None}
        if cache is not None:
            arguments["past_key_values"] = cache
        if not bool(info.mask.all()) or "position_ids" not in self._parameters:
            arguments["attention_mask"] = info.mask  # left out where nothing is padded: the kernel without a mask is faster
        if "position_ids" in self._parameters:
            arguments["position_ids"] = info.positions
        if keep is not None and "logits_to_keep" in self._parameters:
            arguments["logits_to_keep"] = keep
        plan = planner(info)
        with plan.running() if plan is not None else nullcontext():
            return self._model(**arguments)
