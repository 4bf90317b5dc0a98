"""From one prompt of a request to rows of tokens, checked against what the model and the server take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lora_rt.core.generation.messages import Prompt
from lora_rt.core.generation.row import LengthError
from lora_rt.core.generation.sampling import Sampling
from lora_rt.core.generation.template import PromptError
from lora_rt.core.requests.composition import Composition
from lora_rt.core.requests.running import RequestRow
from lora_rt.core.runtime import Runtime
from lora_rt.core.serving.settings import Limits

_LETTERS = 32  # of a token at most, on the average of a whole prompt


@dataclass(frozen=True, slots=True)
class Ask:
    """One request; `model`, `composition` and `scene` as of `Names.composition`."""

    prompts: Sequence[Prompt | list[int]]  # chats or texts, or token ids of texts that are gone on with (`raw`)
    model: str
    composition: Mapping[str, float] | str | None = None
    scene: str | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)  # of `Runtime.generate`; no limit where none is named
    answers: int = 1  # to each prompt
    seed: int | None = None  # of the first row; those behind it count on
    likely: int | None = None  # how many likely tokens are told beside each; None tells no log p at all
    raw: bool = False


class Preparer:
    """Makes rows. Belongs to the thread that prepares.

    Args:
        runtime: whose rows they are.
        limits: of the server.
        kv_bytes: room for keys and values of all rows.
    """

    def __init__(self, runtime: Runtime, limits: Limits, kv_bytes: int) -> None:
        self._runtime = runtime
        self._limits = limits
        lm = runtime.parts.lm
        self.capacity = min(limits.tokens or lm.capacity, lm.capacity)
        self.bytes_per_token = bytes_per_token(runtime)
        self._most = kv_bytes // self.bytes_per_token

    def rows(self, ask: Ask, composition: Composition | None) -> list[RequestRow]:
        """The rows of a request, those of its first prompt first.

        Raises:
            LoraRtError: a prompt, a setting or the composition can't be used.
        """
        rows = [row for place in range(len(ask.prompts)) for row in self._rows(ask, place, composition)]
        for row in rows:
            row.likely = ask.likely
            self._runtime.parts.try_out(row, row.timeline.row)  # so that what fails, fails here and not in a step
        return rows

    def need(self, row: RequestRow) -> int:
        """How many tokens a row may come to.

        Raises:
            LengthError: the server could never hold so many.
        """
        need = min(row.length + row.sampling.max_new_tokens, self.capacity)
        if need > self._most:
            text = f"{need} tokens are more than this server has memory for"
            raise LengthError(text, next_step="Shorten the prompt, or ask for fewer tokens")
        return need

    def _rows(self, ask: Ask, place: int, composition: Composition | None) -> list[RequestRow]:
        """The rows of one prompt, each with a seed of its own."""
        prompt, many = ask.prompts[place], ask.answers
        ids = self._ids(prompt, ask.raw)
        seeds = [None if ask.seed is None else ask.seed + place * many + n for n in range(many)]
        return self._runtime.parts.rows(
            [ids] * many,
            composition,
            [ask.scene] * many,
            prompts=[prompt] * many,
            sampling=self._sampling(ask.sampling, len(ids)),
            seeds=seeds,
            spoken=True,
        )

    def _ids(self, prompt: Prompt | list[int], raw: bool) -> list[int]:
        """The tokens of a prompt, at least one."""
        text = self._runtime.text
        self.check_letters(prompt)
        if isinstance(prompt, list) and prompt and isinstance(prompt[0], int):
            ids = self._known(prompt)
        elif raw:
            assert isinstance(prompt, str)
            ids = text.document_ids(prompt)
        else:
            ids = text.prompt_ids(prompt)  # type: ignore[arg-type]  # token ids were looked at above
        if not ids:
            raise LengthError("the prompt is empty", next_step="Give at least one token")
        return ids

    def check_letters(self, prompt: Prompt | list[int]) -> None:
        """Refuse what is far too long before it is tokenized, for which the others would have to wait.

        Raises:
            LengthError: it is.
        """
        size = len(prompt) if isinstance(prompt, str) else sum(_letters(part) for part in prompt)
        if size > _LETTERS * self.capacity:
            text = f"this model takes {self.capacity} tokens in all, and the prompt has {size} letters"
            raise LengthError(text, next_step="Shorten the prompt")

    def _known(self, ids: list[Any]) -> list[int]:
        size = self._runtime.base.vocab_size
        if any(not isinstance(i, int) or not 0 <= i < size for i in ids):
            text = f"the prompt holds token ids that this model does not have; they are from 0 to {size - 1}"
            raise PromptError(text, next_step="Tokenize it with this model's tokenizer")
        return list(ids)

    def _sampling(self, settings: Mapping[str, Any], read: int) -> Sampling:
        """The settings of a request behind a prompt of so many tokens."""
        limit, room = settings.get("max_new_tokens"), self.capacity - read
        if room < 1 or (limit is not None and limit > room):
            answer = "" if limit is None else f" and {limit} for the answer"
            text = f"this model takes {self.capacity} tokens in all, and the prompt has {read}{answer}"
            raise LengthError(text, next_step="Shorten the prompt, or ask for fewer tokens")
        most = min(room, self._limits.answer_tokens) if limit is None else limit
        sampling = Sampling(**{**settings, "max_new_tokens": most})
        sampling.check()
        return sampling


def _letters(part: Any) -> int:
    """Of a message; a token counts as one."""
    return len(str(part.get("content", ""))) if isinstance(part, Mapping) else 1


def bytes_per_token(runtime: Runtime) -> int:
    """What a token of a row takes in the cache, found out with two of them."""
    lm = runtime.parts.lm
    if lm.keeping == "none":
        return 1
    cache = lm.new_cache()
    ids = torch.zeros((1, 2), dtype=torch.long, device=lm.device)
    with torch.inference_mode():
        lm.forward(ids, torch.ones_like(ids), torch.arange(2, device=lm.device)[None], cache=cache, keep=1)
    kept = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return max(1, sum(int(tensor.nbytes) for tensor in kept if tensor is not None) // 2)
