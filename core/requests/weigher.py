"""From compositions and scenes to the rows of a request: each term's mode decides its weight, in every phase.

A row has one phase per set of texts that may have appeared: `emotion:0.7 logic:0.5[So:] body[Then]` has four.

    appeared       weights
    nothing        emotion 0.7                          the row itself
    So:            emotion 0.7, logic 0.5               phases[{"So:"}]
    Then           emotion 0.7, body 1                  phases[{"Then"}]
    both           emotion 0.7, logic 0.5, body 1       phases[{"So:", "Then"}]

All are weighed at once, so that nothing can be refused in the middle of an answer; `timeline.py` says which one holds.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

from lora_rt.core.requests.composition import Composition
from lora_rt.core.requests.measured import outside
from lora_rt.core.requests.moded import ModedComposition
from lora_rt.core.requests.residents import Residents, ResolvedTerm
from lora_rt.core.requests.rows import RequestError, Row, Turns, Waking
from lora_rt.core.requests.scene_classifier import SceneClassifier
from lora_rt.plugins.contract import BaseFacts, ComposeContext, SceneType, TermFacts
from lora_rt.plugins.manager import ModeHost

_log = logging.getLogger("lora_rt.requests")
_MOST_TEXTS = 4  # each doubles the phases of a row


class Weigher:
    """Turns compositions into weights, asking each term's mode."""

    def __init__(
        self,
        residents: Residents,
        modes: ModeHost,
        base: BaseFacts,
        classifier: SceneClassifier,
    ) -> None:
        self._residents = residents
        self._modes = modes
        self._base = base
        self._classifier = classifier
        self.told: set[str] = set()  # kinds of mixes that were warned of, here or by who asks

    def rows(
        self,
        compositions: Sequence[Composition | None],
        scenes: Sequence[Turns],
        prompts: Sequence[str | None],
        ids: Sequence[Sequence[int]],
    ) -> list[Row]:
        """One row each; `ids` are the tokens of the prompts, by which a scene that nobody gave is classified."""
        found = self._residents.resolved(compositions)
        for row in found:
            self._caution(row)
        # A composition that knows scenes is asked before its adapters, which may have learned other ones.
        asked = [[x for item in row for x in (item.moded, item.adapter) if x is not None] for row in found]
        known = self._classifier.classified(asked, scenes, ids)
        modes = {item.info.mode for row in found for item in row}
        parts = list(zip(found, known, prompts, strict=True))
        return self._modes.deciding(modes, lambda: [self._row(*part) for part in parts])

    def _caution(self, found: Sequence[ResolvedTerm]) -> None:
        """Once per kind: a server is asked a thousand times."""
        outer = outside([(item.info.name, item.term.mean_weight) for item in found], self._base.id)
        if outer.keys() - self.told - {"base"}:
            _log.warning("%s", "; ".join(outer.values()))
            self.told |= outer.keys()

    def _row(self, found: Sequence[ResolvedTerm], turns: Turns, prompt: str | None) -> Row:
        waited = [*(key for item in found for key in _wakings(item)), *(after for after, _ in turns)]
        texts = list(dict.fromkeys(text for text in waited if text))
        if len(texts) > _MOST_TEXTS:
            text = f"a row waits for {len(texts)} texts"
            raise RequestError(text, next_step=f"Let it wait for at most {_MOST_TEXTS}")
        phases = {
            frozenset(seen): self._phase(found, turns, frozenset(seen), prompt)
            for count in range(len(texts) + 1)
            for seen in combinations(texts, count)
        }
        first = phases.pop(frozenset())
        return replace(first, phases=phases) if phases else first

    def _phase(self, found: Sequence[ResolvedTerm], turns: Turns, seen: frozenset[Waking], prompt: str | None) -> Row:
        """The row while exactly these texts have appeared."""
        scene = next((kind for after, kind in reversed(turns) if after is None or after in seen), None)
        awake = [item for item in found if seen.issuperset(_wakings(item))]
        weights: dict[str, float] = {}
        layers: dict[str, tuple[float, ...]] = {}
        moded: dict[ModedComposition, dict[str, float]] = {}
        for item, weight in zip(awake, self._decided(awake, scene, prompt), strict=True):
            name, factors = item.info.name, item.term.layers
            if item.moded is not None:  # of a named composition with a mode: that mode decides at every pass
                mixed = moded.setdefault(item.moded, {})
                mixed[name] = mixed.get(name, 0.0) + weight
            elif factors:  # (layers,): a weight per layer
                before = layers.get(name, (0.0,) * len(factors))
                layers[name] = tuple(b + weight * x for b, x in zip(before, factors, strict=True))
            else:
                weights[name] = weights.get(name, 0.0) + weight
        return Row({item.info.name: item.adapter for item in awake}, weights, scene, prompt, layers, moded=moded)

    def _decided(self, found: Sequence[ResolvedTerm], scene: SceneType, prompt: str | None) -> list[float]:
        """The user's weights, except where a term's mode says otherwise."""
        weights = [item.term.weight for item in found]
        modes = dict.fromkeys(item.info.mode for item in found)
        deciding = [mode for mode in modes if self._modes.implements(mode, "lora_rt_compose")]
        if not deciding:
            return weights
        terms = [
            TermFacts(item.info.name, item.term.weight, item.info.mode, item.adapter.card, item.adapter.state)
            for item in found
        ]
        for mode in deciding:
            mine = [index for index, term in enumerate(terms) if term.mode == mode]
            context = ComposeContext(terms=terms, mine=mine, prompt=prompt, scene_type=scene, base=self._base)
            decided = self._modes.weights(mode, context)
            if decided is not None:
                for index, weight in zip(mine, decided, strict=True):
                    weights[index] = weight
        return weights


def _wakings(item: ResolvedTerm) -> list[Waking]:
    """What a term waits for: the text in its bracket, and the tokens of an aLoRA."""
    wakings: tuple[Waking | None, ...] = (item.term.after, item.adapter.invocation)
    return [waking for waking in wakings if waking]
