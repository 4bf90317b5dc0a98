"""One row of a request, from what the caller wrote to what the engine needs: tokens, weights, scene type."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lora_rt.core.composition import Composition
from lora_rt.core.residents import Residents
from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import BaseFacts, ComposeContext, SceneType, TermFacts
from lora_rt.plugins.manager import ModeHost

Compositions = Composition | str | None | Sequence[Composition | str | None]


class RequestError(LoraRtError):
    """A request whose parts do not fit together."""


@dataclass(frozen=True, slots=True)
class Row:
    """Resident name -> weight, and the registered scene type."""

    weights: Mapping[str, float]
    scene_type: SceneType = None


def per_row(value: Compositions, rows: int) -> list[Composition | None]:
    """One composition per row; a single one stands for all of them.

    Raises:
        RequestError: a list of another length.
    """
    if value is None or isinstance(value, (str, Composition)):
        return [Composition.of(value)] * rows
    given = list(value)
    if len(given) != rows:
        raise RequestError(f"{len(given)} compositions for {rows} rows", next_step="Give one for all, or one per row")
    return [Composition.of(item) for item in given]


def scenes_per_row(scenes: Sequence[SceneType] | str | None, rows: int) -> list[SceneType]:
    """One scene type per row.

    Raises:
        RequestError: a list of another length.
    """
    if scenes is None or isinstance(scenes, str):
        return [scenes] * rows
    if len(scenes) != rows:
        raise RequestError(
            f"{len(scenes)} scene types for {rows} rows", next_step="Give one per row, None where it is not known"
        )
    return list(scenes)


class Weigher:
    """Turns compositions into weights, asking each term's mode."""

    def __init__(self, residents: Residents, modes: ModeHost, base: BaseFacts) -> None:
        self._residents = residents
        self._modes = modes
        self._base = base

    def rows(
        self, compositions: Sequence[Composition | None], scenes: Sequence[SceneType], prompts: Sequence[str | None]
    ) -> list[Row]:
        """One row each."""
        return [self._row(c, scene, prompt) for c, scene, prompt in zip(compositions, scenes, prompts, strict=True)]

    def _row(self, composition: Composition | None, scene: SceneType, prompt: str | None) -> Row:
        if composition is None:
            return Row({}, scene)
        found = self._residents.ensure(composition)
        terms = [TermFacts(i.name, weight, i.mode, i.card.model_dump() if i.card else {}) for i, weight in found]
        weights = self._decided(terms, scene, prompt)
        summed: dict[str, float] = {}
        for term, weight in zip(terms, weights, strict=True):
            summed[term.name] = summed.get(term.name, 0.0) + weight
        return Row(summed, scene)

    def _decided(self, terms: Sequence[TermFacts], scene: SceneType, prompt: str | None) -> list[float]:
        """The user's weights, except where a term's mode says otherwise."""
        weights = [term.weight for term in terms]
        for mode in dict.fromkeys(term.mode for term in terms):
            if not self._modes.implements(mode, "lora_rt_compose"):
                continue
            mine = [index for index, term in enumerate(terms) if term.mode == mode]
            context = ComposeContext(terms=terms, mine=mine, prompt=prompt, scene_type=scene, base=self._base)
            decided = self._modes.weights(mode, context)
            if decided is not None:
                for index, weight in zip(mine, decided, strict=True):
                    weights[index] = weight
        return weights
