"""A named composition whose mode decides for its adapters: its state, fitted with base and adapters frozen.

The mode's own hooks are the functions: `lora_rt_mixture` gives the state that is the static composition, and gradients
lead through `lora_rt_joint_gate` to it. Where the data has scene types and the mode tells them apart
(`lora_rt_scene`), its classifier is fitted first, on prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from lora_rt.core.tuning import shares
from lora_rt.core.tuning.classifier import Classifier
from lora_rt.core.tuning.data import Item, chance, chunks, steps
from lora_rt.core.tuning.frozen import Best, Frozen, distance_from_one
from lora_rt.core.tuning.settings import MixSettings, SceneSettings, TuneError, check_loss
from lora_rt.plugins.contract import AdapterView, Gate, JointGateContext, MixtureContext

NEUTRAL = "neutral"
_LOOKS = 6  # how often on the way the state is tried on the held-out examples
_MOST_ASIDE = 48  # of them, so that trying does not take longer than fitting
_ROWS = 16
_LOOKED_AT = 64  # examples whose hidden states the mode may look at before it begins


class MixFit:
    """One fit of a composition.

    Args:
        frozen: base and adapters.
        name: the composition's.
        start: resident name -> weight of the static composition.
        items: examples; those of the scene type "neutral" teach the classifier alone.
        settings: of the fit; `settings.mode` is the mode that decides, `settings.options` are its own.

    Raises:
        LoraRtError: the mode can't mix these adapters.
    """

    def __init__(
        self, frozen: Frozen, name: str, start: Mapping[str, float], items: Sequence[Item], settings: MixSettings
    ) -> None:
        self._frozen = frozen
        self._start = start
        self._settings = settings
        self._items = items
        types = dict.fromkeys(item.scene_type for item in items if item.scene_type not in (None, NEUTRAL))
        context = MixtureContext(
            adapters=list(start),
            weights=list(start.values()),
            scene_types=[str(kind) for kind in types],
            options=settings.options,
            base=frozen.base.facts,
            hidden=self._some_hidden,
        )
        made = frozen.modes.mixture(settings.mode, context)
        self.state: dict[str, Tensor] = {
            key: value.detach().to(frozen.bank.device).float().clone().requires_grad_()
            for key, value in made.state.items()
        }
        self.scene_types = tuple(types)
        self.hidden_layers = made.hidden_layers
        self._shares = made.shares
        self.card = dict(made.card)
        seen = {"weights": list(start.values()), "scene_types": self.scene_types, "hidden_layers": made.hidden_layers}
        self._view = AdapterView(name, {**self.card, **seen}, self.state, frozen.base.facts)

    def fit_classifier(
        self, aside: Sequence[Item], advance: Callable[[float], None], more: Sequence[Item] = ()
    ) -> tuple[float, float] | None:
        """Fit it where there is one and the data has types; `more` are prompts that it learns on beside the data.

        Returns:
            The share of held-out prompts whose type it tells, and that of the most frequent type; None without one.
        """
        mode = self._settings.mode
        if not self.scene_types or not self._frozen.modes.implements(mode, "lora_rt_scene"):
            return None
        classifier = Classifier(self._frozen, mode, self._view, SceneSettings())
        classifier.fit([*self._items, *more], advance)
        return classifier.accuracy(aside), chance(aside)

    def fit(
        self, aside: Sequence[Item], advance: Callable[[float], None] = lambda _loss: None
    ) -> tuple[float, float, list[float]]:
        """Fit the gates and keep the best state seen on held-out examples, perhaps that of the start.

        Returns:
            The loss of held-out examples under the start and under what was kept, nats per token; each step's loss.

        Raises:
            TuneError: the loss is no number.
        """
        settings = self._settings
        gated = self._gated(aside)
        aside = gated[:: -(-len(gated) // _MOST_ASIDE) or 1]
        best = Best(self.state.values(), lambda: self.loss(aside))
        if self._shares:
            self._share_out(aside, advance)
            best.look()
            best.restore()
        batches = list(steps(self._gated(self._items), settings.batch_size, settings.epochs, settings.seed))
        optimizer = torch.optim.Adam(self.state.values(), lr=settings.learning_rate)
        losses: list[float] = []
        for batch in best.over(batches, _LOOKS):
            gates, distance = self._gates(batch)
            total, count = self._frozen.nll(batch, [dict.fromkeys(self._start, 1.0)], gates)
            check_loss(total, len(losses) + 1)
            optimizer.zero_grad()
            (total / count + settings.keep * distance).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(float(total.detach()) / count)
            advance(losses[-1])
        return best.first, best.last, losses

    def _share_out(self, aside: Sequence[Item], advance: Callable[[float], None]) -> None:
        """Give the state what shares are best fitted by where each adapter is seen alone."""
        learned, judged = (
            shares.batches(self._frozen, items, self._start, self.hidden_layers)
            for items in (self._gated(self._items), aside)
        )
        shares.fit(
            list(self.state.values()),
            list(self._start.values()),
            lambda batch, hidden: self._gates(batch, hidden)[0],
            learned,
            judged,
            self._settings.keep,
            advance,
        )

    def loss(self, items: Sequence[Item]) -> float:
        """Nats per answer token under the gates as they are."""
        ordered = sorted(self._gated(items), key=lambda item: len(item.prompt) + len(item.answer))
        if not ordered:
            raise TuneError("the data has only neutral examples", next_step="Give examples of other scene types")
        return self._frozen.mean_nll(chunks(ordered, _ROWS), lambda batch: self._gates(batch)[0])

    def _gated(self, items: Sequence[Item]) -> list[Item]:
        return [item for item in items if item.scene_type != NEUTRAL]

    def _gates(self, batch: Sequence[Item], hidden: Tensor | None = None) -> tuple[dict[str, Gate | None], Tensor]:
        """The gates of a batch with the weights in them, and their mean squared distance from 1.

        Args:
            hidden: (rows, tokens, hidden), where its early hidden states are known.
        """
        residents = self._frozen.bank.residents
        contexts = [
            self._frozen.gate_context(name, batch, residents[name].state, self.hidden_layers, weight, hidden)
            for name, weight in self._start.items()
        ]
        found = self._frozen.modes.mixture_gates(self._settings.mode, JointGateContext(contexts, self._view))
        device = self._frozen.bank.device
        gates: dict[str, Gate | None] = {}
        for (name, weight), gate in zip(self._start.items(), found, strict=True):
            ranks = torch.ones(1, device=device) if gate is None or gate.ranks is None else gate.ranks
            gates[name] = Gate(ranks=weight * ranks, heads=None if gate is None else gate.heads)
        return gates, distance_from_one(found, device)

    def _some_hidden(self, depth: int | None) -> Tensor:
        """(tokens, hidden)"""
        some = [[*item.prompt, *item.answer] for item in self._items[:_LOOKED_AT]]
        hidden, mask = self._frozen.classifier.features(some, depth)
        return hidden[mask.bool()].float().clone()
