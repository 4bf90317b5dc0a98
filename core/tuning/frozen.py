"""A base and resident adapters that stay as they are, and the loss of answers under gates that carry a gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lora_rt.core.base.load import LoadedBase
from lora_rt.core.base.shape import ForwardPass, pad_right
from lora_rt.core.engine.bank import AdapterBank
from lora_rt.core.engine.hidden_states import EarlyHidden
from lora_rt.core.requests.residents import Residents
from lora_rt.core.requests.scene_classifier import SceneClassifier
from lora_rt.core.tuning.data import Item
from lora_rt.plugins.contract import Gate
from lora_rt.plugins.manager import ModeHost
from lora_rt.registry.registry import Registry

IGNORED = -100


class Frozen:
    """The parts of a runtime whose base was loaded with `for_training`."""

    def __init__(self, base: LoadedBase, modes: ModeHost, registry: Registry) -> None:
        self.base = base
        self.modes = modes
        self.bank = AdapterBank(base.model, base.dtype)
        self.early = EarlyHidden(base.model, base.facts.layers)
        self.residents = Residents(base, self.bank, modes, registry)
        self._pass = ForwardPass.of(base.model)
        self.classifier = SceneClassifier(self.bank, modes, base.facts, self.early)

    def tensors(self, items: Sequence[Item]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, mask and labels of a batch, all (rows, tokens), padded on the right; labels on the answers alone."""
        rows = [[*item.prompt, *item.answer] for item in items]
        ids, mask = pad_right(rows, self.bank.device)
        labels = torch.full_like(ids, IGNORED)
        for row, item in enumerate(items):
            labels[row, len(item.prompt) : len(rows[row])] = ids[row, len(item.prompt) : len(rows[row])]
        return ids, mask, labels

    def nll(
        self, items: Sequence[Item], weights: Sequence[Mapping[str, float]], gates: Mapping[str, Gate | None]
    ) -> tuple[Tensor, int]:
        """The summed negative log-likelihood of the answers in nats, and how many tokens they have.

        Args:
            items: the batch.
            weights: resident name -> weight, per row or once for all.
            gates: resident name -> gate, whose tensors may require a gradient.
        """
        ids, mask, labels = self.tensors(items)
        columns = (labels[:, 1:] != IGNORED).any(0).nonzero().flatten()
        plan = self.bank.plan(weights, gates)
        rows, tokens = ids.shape
        kept = columns if self._pass.takes_columns else None
        with plan.running(rows, tokens, kept) if plan is not None else nullcontext():
            logits = self.base.model(**self._pass.arguments(ids, mask, columns)).logits
        logits = self._pass.kept(logits, columns)
        wanted = labels[:, 1:][:, columns]
        total = cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORED, reduction="sum")
        return total, int((wanted != IGNORED).sum())
