"""What a fit is told and where it may go; imports nothing heavy, since it is checked before torch is imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_rt.errors import LoraRtError
from lora_rt.registry import home
from lora_rt.registry.durable import check_writable
from lora_rt.registry.errors import StoreError
from lora_rt.registry.reference import check_name as check_form
from lora_rt.registry.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor

PROMPT_FIELDS = ("scene", "scene_type")
"""What a line of prompts has that teach a classifier alone."""


LEAST = 1e-6
"""Of a start; see `check_weights`."""

_LARGEST = 1e6  # far beyond every weight under which a text is one, and its square is a number in float32


class TuneError(LoraRtError):
    """Settings, adapters, data or weights that nothing can be tuned with."""


@dataclass(frozen=True, slots=True)
class TuneSettings:
    """Of weights. `learning_rate` is Adam's on the weights themselves; `pull` penalises the squared distance from the
    start.
    """

    per: Literal["adapter", "layer"] = "adapter"
    epochs: float = 3
    batch_size: int = 8
    learning_rate: float = 0.03
    pull: float = 0.01
    seed: int = 0


@dataclass(frozen=True, slots=True)
class SceneSettings:
    """Of gates. `keep` is the weight of the mean squared distance of the gates from 1, the static composition.

    `classifier_steps` are full passes over the prompts. Learning rates are Adam's.
    """

    epochs: float = 1
    batch_size: int = 8
    learning_rate: float = 0.1
    keep: float = 0.02
    classifier_steps: int = 300
    classifier_rate: float = 1.0
    classifier_decay: float = 1e-6
    seed: int = 0


@dataclass(frozen=True, slots=True)
class MixSettings:
    """Of a composition whose `mode` decides for its adapters; `options` are the mode's own.

    `keep` is the weight of the mean squared distance of the gates from 1, the static composition. The learning rate is
    Adam's.
    """

    mode: str
    options: Mapping[str, str] = field(default_factory=dict)
    epochs: float = 3
    batch_size: int = 8
    learning_rate: float = 0.03
    keep: float = 0.002
    seed: int = 0


Per = Literal["adapter", "layer", "scene", "token"]
_RATES = {"token": 0.03, "scene": 0.1}
_MODES = {"token": "router", "scene": "context"}


def settings_for(
    per: Per,
    *,
    epochs: float,
    batch_size: int,
    learning_rate: float | None,
    seed: int,
    named: bool = False,
    mode: str | None = None,
    mode_options: Mapping[str, str] | None = None,
    prompts: bool = False,
    folder: bool = False,
) -> TuneSettings | SceneSettings | MixSettings:
    """The settings of what is to be learned; without a learning rate the usual one for it.

    Args:
        per: what is learned.
        epochs: like the three that follow, of the fit.
        named: whether what is learned per scene is to be a named composition, instead of the adapters' own gates.
        mode: of that composition, or of one that is learned per token.
        mode_options: the mode's own.
        prompts: whether there are some that teach a classifier of scene types.
        folder: whether one is given for the adapters.

    Raises:
        TuneError: naming everything that is out of range.
    """
    problems = []
    if not 0 < epochs <= 10_000:
        problems.append(f"epochs is {epochs}; it must be above 0 and at most 10000")
    if learning_rate is not None and not 0 < learning_rate <= 10:
        problems.append(f"the learning rate is {learning_rate}; it must be above 0 and at most 10")
    if not 1 <= batch_size <= 4096:
        problems.append(f"the batch size is {batch_size}; it must be from 1 to 4096")
    if not 0 <= seed < 2**32:
        problems.append(f"the seed is {seed}; it must be from 0 to {2**32 - 1}")
    if per not in ("adapter", "layer", "scene", "token"):
        problems.append(f"weights are learned per adapter, layer, scene or token, not per {per!r}")
    mixed = per == "token" or (per == "scene" and named)
    if (mode or mode_options) and not mixed:
        problems.append("a mode and its options belong to --per token, and to --per scene with a --name")
    if prompts and per != "scene":
        problems.append("prompts with scene types belong to --per scene")
    if folder and per != "scene":
        problems.append("a folder for adapters (--out) belongs to --per scene; all else is kept by its name")
    if problems:
        raise TuneError("these settings can't tune", problems=problems, next_step="See: lora-rt tune --help")
    made: TuneSettings | SceneSettings | MixSettings
    if mixed:
        made = MixSettings(mode or _MODES[per], mode_options or {}, epochs, batch_size, _RATES[per], seed=seed)
    elif per == "scene":
        made = SceneSettings(epochs=epochs, batch_size=batch_size, seed=seed)
    else:
        assert per in ("adapter", "layer")
        made = TuneSettings(per=per, epochs=epochs, batch_size=batch_size, seed=seed)
    return made if learning_rate is None else replace(made, learning_rate=learning_rate)


def check_weights(weights: Mapping[str, float], least: float = 0.0) -> None:
    """Raises TuneError where weights, of adapters by name, are beyond what float32 can be tuned with.

    `least` is what a weight that is not 0 has to reach: a start that is as good as 0 can't be left.
    """
    large = [f"{name}:{weight:g}" for name, weight in weights.items() if not abs(weight) < _LARGEST]
    small = [f"{name}:{weight:g}" for name, weight in weights.items() if 0 < abs(weight) < least]
    if large or small:
        told = (("large", large), ("small", small))
        text = "; ".join(f"weights are too {what}: {', '.join(which)}" for what, which in told if which)
        raise TuneError(text, next_step="Start from weights around 1, and lower --lr")


def check_loss(loss: Tensor, step: int) -> None:
    """Raises TuneError where the loss of a step, counted from 1, is not a number: what follows would be none either."""
    if not bool(loss.isfinite()):
        text = f"the loss is {float(loss.detach())} at step {step}"
        raise TuneError(text, next_step="Start from weights around 1, and lower --lr")


def check_name(name: str, registry: Registry) -> None:
    """Raises LoraRtError where a composition can't have this name: an adapter has it, or it is not a name."""
    check_form(name, "a composition")
    if name in registry.names():
        text = f"{name!r} is the name of an adapter"
        raise StoreError(text, next_step="Give the composition another one with --name")


def check_composition_place(name: str, registry: Registry) -> None:
    """Before minutes of work: that a composition can have this name, and that the store takes one.

    Raises:
        LoraRtError: it can't, or the store can't be written.
    """
    check_name(name, registry)
    check_writable(registry.compositions.folder)


def check_adapters_place(out: Path | None, registry: Registry) -> None:
    """The same for adapters: the folder `out` or the store, and the home, where they are kept until they are published.

    Raises:
        LoraRtError: a place can't be written.
    """
    check_writable(home.checkpoints())
    check_writable(registry.store.root if out is None else out)
