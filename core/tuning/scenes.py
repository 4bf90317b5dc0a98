"""A mode's gates and classifier, fitted by scene type with its adapters frozen.

The mode's own hooks are the functions, the tensors of its state what is fitted: `lora_rt_scene` by the cross entropy of
the types of prompts, then `lora_rt_gate` and `lora_rt_compose` by the likelihood of the answers under their true types.
Whatever a hook leaves out of its result gets no gradient and stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lora_rt.core.tuning.classifier import Classifier
from lora_rt.core.tuning.data import Item, chance, chunks, steps
from lora_rt.core.tuning.frozen import Best, Frozen, distance_from_one
from lora_rt.core.tuning.settings import SceneSettings, TuneError, check_loss
from lora_rt.plugins.contract import AdapterView, ComposeContext, Gate, TermFacts

State = dict[str, Tensor]


class SceneFit:
    """One fit over the adapters of a composition.

    Args:
        frozen: base and adapters.
        start: resident name -> weight of the static composition.
        items: examples with scene types. Those of a type in `neutral` teach the classifier alone.
    """

    def __init__(
        self, frozen: Frozen, start: Mapping[str, float], items: Sequence[Item], settings: SceneSettings
    ) -> None:
        self._frozen = frozen
        self._start = start
        self._settings = settings
        self._items = items
        residents = frozen.bank.residents
        self._names = [name for name in start if frozen.modes.implements(residents[name].mode, "lora_rt_gate")]
        self.states: dict[str, State] = {
            name: {
                key: value.detach().to(frozen.bank.device).float().clone().requires_grad_()
                for key, value in residents[name].state.items()
                if value.is_floating_point()
            }
            for name in self._names
        }
        self._check()
        first = self._names[0]
        view = AdapterView(first, self._card(first), self.states[first], frozen.base.facts)
        self._classifier = Classifier(frozen, self._mode(first), view, settings)

    def _check(self) -> None:
        types = {name: tuple(self._card(name).get("scene_types", ())) for name in self._names}
        problems = [f"{name} has no gates: its mode is {self._mode(name)}" for name in self._start if name not in types]
        problems += [f"{name} keeps no state or knows no scene types" for name, t in types.items() if not t]
        if len(set(types.values())) > 1:
            problems.append("they know different scene types")
        if len({self._card(name).get("hidden_layers") for name in self._names}) > 1:
            problems.append("they read the hidden state at different depths")
        if problems:
            text = "gates can't be fitted to these adapters"
            raise TuneError(text, problems=problems, next_step="Train them with --mode context and one --scene-types")
        self.types = next(iter(types.values()))

    def fit_classifier(self, advance: Callable[[float], None] = lambda _loss: None, more: Sequence[Item] = ()) -> float:
        """Fit the first adapter's classifier and give it to all that are like it.

        `more` are prompts that it learns on beside the examples.

        Returns:
            The share of prompts that it gets right.
        """
        touched = self._classifier.fit([*self._items, *more], advance)
        for other in self._names[1:]:
            for key, value in touched.items():
                if key in self.states[other] and self.states[other][key].shape == value.shape:
                    self.states[other][key].data.copy_(value.data)
        return self._classifier.accuracy(self._items)

    def fit_gates(self, advance: Callable[[float], None] = lambda _loss: None, best: Best | None = None) -> list[float]:
        """Fit the gates on the examples of the types that the adapters know; each step's loss, nats per token.

        The state is the last one, or where there is `best`, the best one that this has seen.
        """
        items = [item for item in self._items if item.scene_type in self.types]
        if not items:
            text = f"no line of the data has a scene type of these adapters: {', '.join(self.types)}"
            raise TuneError(text, next_step="Give examples of these types")
        optimizer = torch.optim.Adam(self._leaves(), lr=self._settings.learning_rate)
        batches = list(steps(items, self._settings.batch_size, self._settings.epochs, self._settings.seed))
        losses: list[float] = []
        for batch in best.over(batches) if best else batches:
            gates, distance = self._gates(batch)
            total, count = self._frozen.nll(batch, [dict.fromkeys(self._start, 1.0)], gates)
            check_loss(total, len(losses) + 1)
            optimizer.zero_grad()
            (total / count + self._settings.keep * distance).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(float(total.detach()) / count)
            advance(losses[-1])
        return losses

    def fit_best_gates(
        self, aside: Sequence[Item], advance: Callable[[float], None] = lambda _loss: None
    ) -> tuple[float, float, list[float]]:
        """Fit the gates and keep the best ones seen on held-out examples, perhaps those of the start.

        Returns:
            The loss of held-out examples under the start and under what was kept, nats per token; each step's loss.
        """
        best = Best(self._leaves(), lambda: self.loss(aside))
        losses = self.fit_gates(advance, best)
        return best.first, best.last, losses

    def loss(self, items: Sequence[Item]) -> float:
        """Nats per answer token of the examples whose types the adapters know, under the gates as they are.

        Raises:
            TuneError: there are none.
        """
        known = [item for item in items if item.scene_type in self.types]
        if not known:
            text = f"no two lines of the data have one scene type of these adapters: {', '.join(self.types)}"
            raise TuneError(text, next_step="Give examples of these types")
        return self._frozen.mean_nll(chunks(known, 32), lambda batch: self._gates(batch)[0])

    def accuracy(self, items: Sequence[Item]) -> tuple[float, float]:
        """The share of prompts whose type the classifier tells, and the share of the most frequent type."""
        return self._classifier.accuracy(items), chance(items)

    def _leaves(self) -> list[Tensor]:
        return [value for state in self.states.values() for value in state.values()]

    def _gates(self, batch: Sequence[Item]) -> tuple[dict[str, Gate | None], Tensor]:
        """The gates of a batch with the weights in them, and their mean squared distance from 1."""
        weights = self._weights(batch)
        found = {name: self._gate(name, batch) for name in self._start}
        gates: dict[str, Gate | None] = {
            name: Gate(ranks=weights[name] if gate.ranks is None else weights[name] * gate.ranks, heads=gate.heads)
            for name, gate in found.items()
        }
        return gates, distance_from_one([*found.values()], self._frozen.bank.device)

    def _gate(self, name: str, batch: Sequence[Item]) -> Gate:
        depth = self._card(name).get("hidden_layers")
        context = self._frozen.gate_context(name, batch, self.states[name], depth)
        return self._frozen.modes.gate(self._mode(name), context) or Gate()

    def _weights(self, batch: Sequence[Item]) -> dict[str, Tensor]:
        """Resident name -> its weight as the mode decides, (1, rows, 1, 1), with the gradient to the state."""
        by_type = {kind: self._decided(kind) for kind in dict.fromkeys(item.scene_type for item in batch)}
        rows = torch.stack([by_type[item.scene_type] for item in batch])
        return {name: rows[None, :, index, None, None] for index, name in enumerate(self._start)}

    def _decided(self, kind: str | None) -> Tensor:
        """(adapters,)"""
        terms = [
            TermFacts(name, weight, self._mode(name), self._card(name), self.states[name])
            for name, weight in self._start.items()
        ]
        values: list[Tensor | float] = list(self._start.values())
        for mode in dict.fromkeys(term.mode for term in terms):
            mine = [index for index, term in enumerate(terms) if term.mode == mode]
            context = ComposeContext(terms=terms, mine=mine, prompt=None, scene_type=kind, base=self._frozen.base.facts)
            # Unchecked: a check would turn the tensors, which carry the gradient, into numbers.
            decided = self._frozen.modes.call(mode, "lora_rt_compose", context=context)
            for index, value in zip(mine, decided if decided is not None else [], strict=decided is not None):
                values[index] = value
        device = self._frozen.bank.device
        return torch.stack([torch.as_tensor(value, device=device, dtype=torch.float32) for value in values])

    def _card(self, name: str) -> Mapping[str, Any]:
        return self._frozen.bank.residents[name].card

    def _mode(self, name: str) -> str:
        return self._frozen.bank.residents[name].mode
