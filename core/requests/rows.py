"""One row of a request, from what the caller wrote to what the engine needs: tokens, weights, scene type."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from lora_rt.core.requests.composition import Composition
from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import SceneType

Compositions = Composition | str | None | Sequence[Composition | str | None]


class RequestError(LoraRtError):
    """A request whose parts do not fit together."""


@dataclass(frozen=True, slots=True)
class Row:
    """What one row of a request is under.

    `weights` by resident name; `layers` is added to them, one number per layer, where a named composition says so.
    `scene_type` is the caller's or the registered one. `phases` are the rows to go on as once activation texts have
    appeared, by the set of those that have (see `lora_rt.core.requests.timeline`); empty where nothing changes.
    """

    weights: Mapping[str, float]
    scene_type: SceneType = None
    prompt: str | None = None
    layers: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    phases: Mapping[frozenset[str], Row] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """The adapters that act, now or in a later phase."""
        now = [name for name, weight in self.weights.items() if weight != 0.0]
        later = [name for phase in self.phases.values() for name in phase.names]
        return list(dict.fromkeys([*now, *self.layers, *later]))

    @property
    def texts(self) -> list[str]:
        """The activation texts that it waits for."""
        return sorted({text for seen in self.phases for text in seen})

    def only(self, name: str) -> Row:
        """The same with a single one of its adapters."""
        return replace(
            self,
            weights={key: weight for key, weight in self.weights.items() if key == name},
            layers={key: layers for key, layers in self.layers.items() if key == name},
            phases={seen: phase.only(name) for seen, phase in self.phases.items()},
        )

    def phase(self, seen: Iterable[str]) -> Row:
        """The row to go on as when these texts have appeared."""
        return self.phases.get(frozenset(seen), self)


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
        text = f"{len(scenes)} scene types for {rows} rows"
        raise RequestError(text, next_step="Give one per row, None where it is not known")
    return list(scenes)
