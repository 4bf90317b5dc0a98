"""Scene classification: the scene types of prompts, where the caller gave none; once per request, before it begins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lora_rt.core.base.shape import pad_right, positions_of
from lora_rt.core.engine.resident import ResidentAdapter
from lora_rt.core.forward.causal_lm import CausalLM
from lora_rt.core.forward.hidden_states import EarlyHidden
from lora_rt.core.requests.moded import ModedComposition
from lora_rt.core.requests.rows import Turns
from lora_rt.plugins.contract import BaseFacts, SceneContext, ScenePrediction
from lora_rt.plugins.manager import ModeHost

_HOOK = "lora_rt_scene"
Asked = ResidentAdapter | ModedComposition


class SceneClassifier:
    """Asks the modes, with the base's early hidden state of the prompts."""

    def __init__(self, lm: CausalLM, modes: ModeHost, base: BaseFacts, early: EarlyHidden) -> None:
        self._lm = lm
        self._modes = modes
        self._base = base
        self._early = early

    def classified(
        self, adapters: Sequence[Sequence[Asked]], scenes: Sequence[Turns], prompts: Sequence[Sequence[int]]
    ) -> list[Turns]:
        """The scenes, with those that nobody gave replaced where one of the row's adapters can tell them.

        Args:
            adapters: those of each row's terms, and the named compositions that have a mode.
            scenes: what the caller gave.
            prompts: the token ids of each row's prompt.
        """
        found = list(scenes)
        asked: dict[Asked, list[int]] = {}
        for row, mine in enumerate(adapters):
            able = next((one for one in mine if self._modes.implements(one.mode, _HOOK)), None)
            if able is not None and len(scenes[row]) == 1 and scenes[row][0][1] is None:
                asked.setdefault(able, []).append(row)
        for adapter, rows in asked.items():
            prediction = self.ask(adapter, [prompts[row] for row in rows])
            if prediction is not None:
                for row, shares in zip(rows, prediction.probabilities.tolist(), strict=True):
                    found[row] = [(None, dict(zip(prediction.types, shares, strict=True)))]
        return found

    def ask(self, adapter: Asked, prompts: Sequence[Sequence[int]]) -> ScenePrediction | None:
        """What one adapter's mode makes of prompts, given as token ids."""
        hidden, mask = self.features(prompts, adapter.card.get("hidden_layers"))
        context = SceneContext(
            adapter=adapter.name, card=adapter.card, state=adapter.state, base=self._base, hidden=hidden, mask=mask
        )
        return self._modes.scene(adapter.mode, context)

    def features(self, prompts: Sequence[Sequence[int]], depth: int | None = None) -> tuple[Tensor, Tensor]:
        """Early hidden states (rows, tokens, hidden) of prompts and the mask (rows, tokens), padded on the right.

        `depth` is after how many blocks; a quarter of them where left out.
        """
        ids, mask = pad_right(prompts, self._lm.device)
        parts = self._lm.parts([len(prompt) for prompt in prompts])
        if len(parts) == 1:
            return self._early(ids, mask, positions_of(mask), depth), mask
        found = torch.zeros(*ids.shape, self._base.hidden_size, device=ids.device)
        for part in parts:  # rows of other rope factors
            hidden = self._early(ids[part], mask[part], positions_of(mask[part]), depth)
            found = found.to(hidden.dtype)
            found[part] = hidden
        return found, mask
