"""What a row is under, and the scenes that the caller wrote for each row of a request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lora_rt.core.engine.resident import ResidentAdapter
from lora_rt.core.generation.numbers import real
from lora_rt.core.requests.activation import scene_turns
from lora_rt.core.requests.composition import Compositions as Compositions
from lora_rt.core.requests.composition import RequestError as RequestError
from lora_rt.core.requests.moded import ModedComposition
from lora_rt.plugins.contract import SceneType

Scenes = SceneType | Sequence[SceneType]
"""One scene type for all rows of a request, or a list of one per row."""
Waking = str | tuple[int, ...]
"""What changes what a row is under: a text that the user wrote, or the tokens of an aLoRA."""
Turns = Sequence[tuple[str | None, SceneType]]
"""The scene types of a row in order, each with the text after which it holds; the first from the start on."""

_ROUNDING = 1e-3  # shares of a softmax in few bits may add up to a little more than 1


@dataclass(frozen=True, slots=True, eq=False)
class Row:
    """What one row is under; it never changes (see `lora_rt.core.requests.running` for rows that do).

    `adapters` are the residents that it uses, as they were when it began. `weights` by resident name; `layers` is added
    to them, one number per layer, where a named composition says so, and `moded`, weights by resident name that the
    mode of a named composition gates.
    `scene_type` is the caller's or the recognized one. `phases` are the rows to go on as once activation texts have
    appeared, by the set of those that have (see `lora_rt.core.requests.timeline`); empty where nothing changes.
    """

    adapters: Mapping[str, ResidentAdapter]
    weights: Mapping[str, float]
    scene_type: SceneType = None
    prompt: str | None = None
    layers: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    phases: Mapping[frozenset[Waking], Row] = field(default_factory=dict)
    moded: Mapping[ModedComposition, Mapping[str, float]] = field(default_factory=dict)

    def uses(self, name: str) -> bool:
        """Whether an adapter acts in this phase."""
        if self.weights.get(name, 0.0) != 0.0 or name in self.layers:
            return True
        return any(mixed.get(name, 0.0) != 0.0 for mixed in self.moded.values())

    @property
    def static(self) -> bool:
        """Whether its weights are one number per adapter."""
        return not self.layers and not self.moded

    @property
    def texts(self) -> list[Waking]:
        """The activation texts that it waits for."""
        return sorted({text for seen in self.phases for text in seen}, key=str)

    def phase(self, seen: Iterable[Waking]) -> Row:
        """The row to go on as when these texts have appeared."""
        return self.phases.get(frozenset(seen), self)


def scenes_per_row(scenes: Scenes, rows: int) -> list[Turns]:
    """The scene types of every row: one that holds throughout, or several as `logic body[So:]` says.

    Raises:
        RequestError: a list of another length, or a text that is not a scene.
    """
    single = scenes is None or isinstance(scenes, (str, Mapping)) or not isinstance(scenes, Iterable)
    given: list[Any] = [scenes] * rows if single else list(scenes)  # type: ignore[arg-type]
    if len(given) != rows:
        text = f"{len(given)} scene types for {rows} rows"
        raise RequestError(text, next_step="Give one per row, None where it is not known")
    return [_turns(scene) for scene in given]


def _turns(scene: SceneType) -> Turns:
    if isinstance(scene, Mapping):
        shares = {kind: real(share) for kind, share in scene.items()}
        fine = all(share is not None and 0 <= share <= 1 for share in shares.values())
        if not fine or sum(share or 0 for share in shares.values()) > 1 + _ROUNDING:
            text = f"{dict(scene)!r} are not shares of scene types"
            raise RequestError(text, next_step="Give numbers from 0 to 1 that add up to 1")
    elif scene is not None and not isinstance(scene, str):
        raise RequestError(f"{scene!r} is not a scene", next_step="Give a scene type, or shares: {'body': 0.7}")
    if not isinstance(scene, str) or "[" not in scene:
        return [(None, scene)]
    turns = scene_turns(scene)
    if not turns:
        raise RequestError(f"{scene!r} is not a scene", next_step="Write a scene type, or: logic body[So:]")
    return turns
