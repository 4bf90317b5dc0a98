"""Scene registration: the scene types of prompts, where the caller gave none; once per request, before it begins."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lora_rt.core.engine.bank import AdapterBank
from lora_rt.core.engine.hidden_states import EarlyHidden
from lora_rt.core.generation.batch import positions_of
from lora_rt.plugins.contract import BaseFacts, SceneContext, ScenePrediction, SceneType
from lora_rt.plugins.manager import ModeHost

_HOOK = "lora_rt_scene"


class SceneClassifier:
    """Asks the modes, with the base's early hidden state of the prompts."""

    def __init__(self, bank: AdapterBank, modes: ModeHost, base: BaseFacts, early: EarlyHidden) -> None:
        self._bank = bank
        self._modes = modes
        self._base = base
        self._early = early

    def registered(
        self, names: Sequence[Sequence[str]], scenes: Sequence[SceneType], prompts: Sequence[Sequence[int]]
    ) -> list[SceneType]:
        """The scene types, with those that are None replaced where one of the row's adapters can register one.

        Args:
            names: the resident names of each row's terms.
            scenes: what the caller gave.
            prompts: the token ids of each row's prompt.
        """
        found = list(scenes)
        asked: dict[str, list[int]] = {}
        for row, mine in enumerate(names):
            able = next((n for n in mine if self._modes.implements(self._bank.residents[n].mode, _HOOK)), None)
            if scenes[row] is None and able is not None:
                asked.setdefault(able, []).append(row)
        for name, rows in asked.items():
            registration = self.ask(name, [prompts[row] for row in rows])
            if registration is not None:
                for row, shares in zip(rows, registration.probabilities.tolist(), strict=True):
                    found[row] = dict(zip(registration.types, shares, strict=True))
        return found

    def ask(self, name: str, prompts: Sequence[Sequence[int]]) -> ScenePrediction | None:
        """What one adapter's mode makes of prompts, given as token ids."""
        adapter = self._bank.residents[name]
        hidden, mask = self.features(prompts)
        context = SceneContext(
            adapter=name, card=adapter.card, state=adapter.state, base=self._base, hidden=hidden, mask=mask
        )
        return self._modes.scene(adapter.mode, context)

    def features(self, prompts: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Early hidden states (rows, tokens, hidden) of prompts and the mask (rows, tokens), padded on the right."""
        width = max(len(prompt) for prompt in prompts)
        device = self._bank.device
        ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=device)
        mask = torch.tensor([[1] * len(p) + [0] * (width - len(p)) for p in prompts], device=device)
        return self._early(ids, mask, positions_of(mask)), mask
