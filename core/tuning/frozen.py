"""A base and resident adapters that stay as they are, the loss of answers under gates that carry a gradient, and the
best that was seen of what these gates are computed from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lora_rt.core.base.shape import pad_right, positions_of
from lora_rt.core.requests.adapted import AdaptedBase
from lora_rt.core.tuning.data import Item
from lora_rt.plugins.contract import IGNORE, Gate, GateContext


def distance_from_one(gates: Sequence[Gate | None], device: torch.device) -> Tensor:
    """The mean squared distances from 1 of all multipliers, added up; a number."""
    parts = [part for gate in gates if gate is not None for part in (gate.ranks, gate.heads) if part is not None]
    return (
        torch.stack([(part - 1).square().mean() for part in parts]).sum() if parts else torch.zeros((), device=device)
    )


class Frozen(AdaptedBase):
    """A base that was loaded with `for_training`, and its adapters."""

    def tensors(self, items: Sequence[Item]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids, mask and labels of a batch, all (rows, tokens), padded on the right; labels on the answers alone."""
        rows = [[*item.prompt, *item.answer] for item in items]
        ids, mask = pad_right(rows, self.bank.device)
        labels = torch.full_like(ids, IGNORE)
        for row, item in enumerate(items):
            labels[row, len(item.prompt) : len(rows[row])] = ids[row, len(item.prompt) : len(rows[row])]
        return ids, mask, labels

    def gate_context(
        self,
        name: str,
        items: Sequence[Item],
        state: Mapping[str, Tensor],
        depth: int | None,
        weight: float | None = None,
        hidden: Tensor | None = None,
    ) -> GateContext:
        """What a mode's gate is told of a batch of which every row has the adapter.

        Args:
            name: the resident's.
            items: the batch.
            state: its mode's, whose tensors may require a gradient.
            depth: of the hidden states that it may ask for; None for the usual one.
            weight: its weight in all rows, where that is told.
            hidden: the early hidden states (rows, tokens, hidden), where they are known.
        """
        ids, mask, _ = self.tensors(items)
        resident = self.bank.residents[name]

        def states() -> Tensor:
            return self.early(ids, mask, positions_of(mask), depth).clone() if hidden is None else hidden

        return GateContext(
            adapter=name,
            card=resident.card,
            state=state,
            base=self.base.facts,
            rank=resident.rank,
            uniform_rank=len(resident.ranks) == 1,
            input_ids=ids,
            positions=positions_of(mask),
            prompt_lengths=torch.tensor([len(item.prompt) for item in items], device=ids.device),
            active=[True] * len(items),
            scene_types=[item.scene_type for item in items],
            prompts=[None] * len(items),
            weights=[] if weight is None else [weight] * len(items),
            hidden=states,
            history=lambda: (states(), mask),
        )

    def nll(
        self, items: Sequence[Item], weights: Sequence[Mapping[str, float]], gates: Mapping[str, Gate | None]
    ) -> tuple[Tensor, int]:
        """The summed negative log-likelihood of the answers in nats, and how many tokens they have.

        Args:
            items: the batch.
            weights: resident name -> weight, per row or once for all.
            gates: resident name -> gate, whose tensors may require a gradient.
        """
        losses = self.losses(items, weights, gates)
        return losses.sum(), sum(len(item.answer) for item in items)

    def mean_nll(
        self, batches: Iterable[Sequence[Item]], gates: Callable[[Sequence[Item]], Mapping[str, Gate | None]]
    ) -> float:
        """Nats per answer token of all batches; `gates` gives those of a batch, with the weights in them."""
        total, count = 0.0, 0
        with torch.no_grad():
            for batch in batches:
                found = gates(batch)
                nll, tokens = self.nll(batch, [dict.fromkeys(found, 1.0)], found)
                total, count = total + float(nll), count + tokens
        return total / count

    def losses(
        self, items: Sequence[Item], weights: Sequence[Mapping[str, float]], gates: Mapping[str, Gate | None]
    ) -> Tensor:
        """The negative log-likelihood in nats of each token behind the first, (rows, tokens - 1): 0 outside of answers.

        Args:
            items, weights, gates: as for `nll`.
        """
        ids, mask, labels = self.tensors(items)
        wanted = labels[:, 1:]
        columns = (wanted != IGNORE).any(0).nonzero().flatten()
        plan = self.bank.plan(weights, gates)
        logits = self.lm.forward(ids, mask, positions_of(mask), plan=plan, keep=columns)
        found = cross_entropy(
            logits.flatten(0, 1).float(), wanted[:, columns].flatten(), ignore_index=IGNORE, reduction="none"
        )
        whole = found.new_zeros(wanted.shape)
        return whole.index_copy(1, columns, found.view(len(items), -1))


class Best:
    """The best state of some tensors, by a loss on held-out examples: `last`, and `first` that of the start."""

    def __init__(self, tensors: Iterable[Tensor], judge: Callable[[], float]) -> None:
        self._tensors = list(tensors)
        self._judge = judge
        self.first = self.last = judge()
        self._kept = self._copied()

    def look(self) -> None:
        """Keep the tensors as they are now, where that is the best so far."""
        if (found := self._judge()) < self.last:
            self.last, self._kept = found, self._copied()

    def restore(self) -> None:
        """Bring the tensors back to the best state."""
        for tensor, kept in zip(self._tensors, self._kept, strict=True):
            tensor.data.copy_(kept)

    def over(self, batches: Sequence[Sequence[Item]], looks: int = 10) -> Iterator[Sequence[Item]]:
        """The batches, to be stepped on: looks so many times between them and after the last one, then restores."""
        between = max(1, len(batches) // looks)
        for number, batch in enumerate(batches, 1):
            yield batch
            if number % between == 0 or number == len(batches):
                self.look()
        self.restore()

    def _copied(self) -> list[Tensor]:
        return [tensor.detach().clone() for tensor in self._tensors]
