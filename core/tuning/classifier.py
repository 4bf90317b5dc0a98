"""A mode's classifier of scene types, fitted by cross entropy on the early hidden states of prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_rt.core.tuning.data import Item, chunks
from lora_rt.core.tuning.frozen import Frozen
from lora_rt.core.tuning.settings import SceneSettings, TuneError
from lora_rt.plugins.contract import AdapterView, SceneContext

_ROWS = 32


class Classifier:
    """One fit through the hook `lora_rt_scene` of one mode.

    Args:
        frozen: the base, and the modes.
        mode: whose hook it is.
        view: the adapter or composition that it speaks for. The tensors of its state are what is fitted.
        settings: steps, rate and decay.
    """

    def __init__(self, frozen: Frozen, mode: str, view: AdapterView, settings: SceneSettings) -> None:
        self._frozen = frozen
        self._mode = mode
        self._view = view
        self._settings = settings

    def fit(self, items: Sequence[Item], advance: Callable[[float], None] = lambda _loss: None) -> Mapping[str, Tensor]:
        """The tensors of the state that were fitted, which are those that the hook used."""
        batches = [(batch, self._features(batch)) for batch in chunks(items, _ROWS)]
        state = self._view.state
        optimizer = torch.optim.Adam(state.values(), lr=self._settings.classifier_rate)
        touched: dict[str, Tensor] = {}
        for _ in range(self._settings.classifier_steps):
            optimizer.zero_grad()
            total = 0.0
            for batch, features in batches:
                shares, types = self._log_shares(*features)
                loss = -shares.gather(1, self._targets(types, batch)[:, None]).sum() / len(items)
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
            touched = {key: value for key, value in state.items() if value.grad is not None}
            for value in touched.values():
                assert value.grad is not None
                value.grad += self._settings.classifier_decay * value.detach()
            optimizer.step()
            advance(total)
        for value in state.values():
            value.grad = None
        return touched

    def accuracy(self, items: Sequence[Item]) -> float:
        """The share of prompts whose type it tells."""
        right = 0
        with torch.no_grad():
            for batch in chunks(items, _ROWS):
                shares, types = self._log_shares(*self._features(batch))
                right += int((shares.argmax(1) == self._targets(types, batch)).sum())
        return right / len(items)

    def _features(self, batch: Sequence[Item]) -> tuple[Tensor, Tensor]:
        """Hidden states that a gradient may be led past: those of an inference pass may not be kept for one."""
        depth: Any = self._view.card.get("hidden_layers")
        hidden, mask = self._frozen.classifier.features([item.prompt for item in batch], depth)
        return hidden.clone(), mask

    def _log_shares(self, hidden: Tensor, mask: Tensor) -> tuple[Tensor, list[str]]:
        view = self._view
        context = SceneContext(view.adapter, view.card, view.state, view.base, hidden, mask)
        found = self._frozen.modes.scene(self._mode, context)
        if found is None:
            text = f"the mode {self._mode!r} recognizes no scenes"
            raise TuneError(text, next_step="Name the scene type with --scene")
        return found.probabilities.clamp(min=1e-9).log(), list(found.types)

    def _targets(self, types: Sequence[str], batch: Sequence[Item]) -> Tensor:
        strange = sorted({str(item.scene_type) for item in batch} - set(types))
        if strange:
            text = f"the data has the scene type {strange[0]!r}, which {self._view.adapter} does not know"
            raise TuneError(text, next_step=f"Use: {', '.join(types)}")
        return torch.tensor([types.index(str(item.scene_type)) for item in batch], device=self._frozen.bank.device)
