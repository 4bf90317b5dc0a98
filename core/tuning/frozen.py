"""A base and resident adapters that stay as they are, and the loss of answers under gates that carry a gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lora_rt.core.base.shape import pad_right, positions_of
from lora_rt.core.requests.adapted import AdaptedBase
from lora_rt.core.tuning.data import Item
from lora_rt.plugins.contract import Gate

IGNORED = -100


class Frozen(AdaptedBase):
    """A base that was loaded with `for_training`, and its adapters."""

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
        logits = self.lm.forward(ids, mask, positions_of(mask), plan=plan, keep=columns)
        wanted = labels[:, 1:][:, columns]
        total = cross_entropy(logits.flatten(0, 1).float(), wanted.flatten(), ignore_index=IGNORED, reduction="sum")
        return total, int((wanted != IGNORED).sum())
