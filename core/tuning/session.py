"""From what the command line says to a finished fit."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_rt.core.base.load import LoadedBase, load_base
from lora_rt.core.base.shape import context_of
from lora_rt.core.generation.prompts import TextFormat
from lora_rt.core.requests.composition import Composition
from lora_rt.core.requests.named import expanded
from lora_rt.core.training.data import digest_of
from lora_rt.core.training.destination import Destination
from lora_rt.core.training.forms import FIELDS
from lora_rt.core.tuning.data import Item, as_items, held_out, read_lines
from lora_rt.core.tuning.frozen import Frozen
from lora_rt.core.tuning.mixes import MixFit
from lora_rt.core.tuning.saving import composition_of, mixture_of, put_aside, save_composition, sources_of, write_fitted
from lora_rt.core.tuning.scenes import SceneFit
from lora_rt.core.tuning.settings import (
    LEAST,
    PROMPT_FIELDS,
    MixSettings,
    SceneSettings,
    TuneError,
    TuneSettings,
    check_adapters_place,
    check_composition_place,
    check_weights,
)
from lora_rt.core.tuning.weights import tune
from lora_rt.errors import LoraRtError
from lora_rt.plugins.manager import ModeHost, load_modes
from lora_rt.registry.compositions import NamedComposition
from lora_rt.registry.durable import storage_errors
from lora_rt.registry.errors import StoreError
from lora_rt.registry.reference import Reference
from lora_rt.registry.registry import Registry

Advance = Callable[[str, float], None]


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be fitted: a composition whose weights are the start, the data, and the base.

    `prompts` is a file of prompts, from which a classifier of scene types learns beside the data.
    """

    composition: Composition
    data: Path
    base: str
    precision: str
    device: str
    template_variables: Mapping[str, Any] = field(default_factory=dict)
    special_tokens: bool = False
    allow_base_mismatch: bool = False
    prompts: Path | None = None

    def items(self, lines: Sequence[Mapping[str, Any]], base: LoadedBase) -> list[Item]:
        """The examples in the base's tokens."""
        text = TextFormat.of_base(base, self.template_variables, special_tokens=self.special_tokens)
        return as_items(lines, text, context_of(base.model.config))

    def more(self, base: LoadedBase) -> list[Item]:
        """The prompts that teach the classifier alone."""
        return [] if self.prompts is None else self.items(read_lines(self.prompts, *PROMPT_FIELDS), base)


@dataclass(frozen=True, slots=True)
class Fitted:
    """What was fitted by scene: where each adapter went, and on held-out examples the share of prompts whose type was
    told right, that of the most frequent type, and the losses in nats per answer token.
    """

    places: Sequence[str]
    registered: float
    chance: float
    loss_first: float
    loss_last: float

    def document(self) -> dict[str, Any]:
        """The JSON form."""
        losses = [self.loss_first, self.loss_last]
        return {"adapters": list(self.places), "registered": self.registered, "nll": losses}


def open_job(
    job: Job, registry: Registry, modes: ModeHost | None = None
) -> tuple[Frozen, dict[str, float], dict[str, str]]:
    """Base and adapters in memory, their first weights and their references, both by resident name.

    A named composition stands for its adapters, with the weights that it gives them (of weights per layer the mean).

    Args:
        job: what is to be fitted.
        registry: where names resolve.
        modes: the loaded mode plugins; the installed ones by default.

    Raises:
        TuneError: one adapter stands twice, or a term wakes up later.
    """
    base = load_base(job.base, job.precision, job.device, for_training=True)
    frozen = Frozen(base, modes or load_modes(), registry)
    weights: dict[str, float] = {}
    references: dict[str, str] = {}
    for term in job.composition.terms:
        parts = expanded(term, registry.compositions, base.facts)
        for part, item in zip(parts, frozen.residents.resolved([Composition((term,))])[0], strict=True):
            name = item.info.name
            if term.after is not None or name in weights:
                text = f"the term {term} can't be tuned: it wakes up later, or its adapter stands twice"
                raise TuneError(text, next_step="Name every adapter once, without a bracket")
            weights[name] = item.term.mean_weight
            references[name] = _lasting(part.reference)
    return frozen, weights, references


def _lasting(reference: Reference) -> str:
    """The reference in a form that means the same in another working directory."""
    return str(Path(reference.target).expanduser().absolute()) if reference.kind == "path" else reference.text


def _opened(job: Job, registry: Registry | None, modes: ModeHost | None) -> tuple[Registry, ModeHost]:
    """The caller's registry and modes, or new ones."""
    modes = modes or load_modes()
    if registry is None:
        registry = Registry(sources=modes.sources(), allow_base_mismatch=job.allow_base_mismatch)
    return registry, modes


def run(
    job: Job,
    name: str,
    out: Path | None,
    settings: TuneSettings | MixSettings | SceneSettings,
    advance: Advance,
    *,
    registry: Registry | None = None,
    modes: ModeHost | None = None,
) -> NamedComposition | Fitted:
    """What the settings are of: weights or a mixture under a name, or gates of adapters, in the store or in `out`.

    Args:
        job: what is to be fitted.
        name: of the composition that is kept.
        out: a folder for adapters; the store by default.
        settings: of the fit.
        advance: called after each step with what is fitted and the loss.
        registry: where names resolve, and whose store takes what is found; that of the working directory by default.
        modes: the loaded mode plugins; the installed ones by default.

    Raises:
        LoraRtError: as `tune_composition`, `tune_mixture` and `fit_scenes`.
    """
    if job.prompts is not None:
        read_lines(job.prompts, *PROMPT_FIELDS)  # before the base is loaded
    registry, modes = _opened(job, registry, modes)
    if isinstance(settings, SceneSettings):
        return fit_scenes(job, out, settings, advance, registry=registry, modes=modes)
    if isinstance(settings, MixSettings):
        return tune_mixture(job, name, settings, advance, registry=registry, modes=modes)
    return tune_composition(job, name, settings, advance, registry=registry, modes=modes)


def tune_composition(
    job: Job,
    name: str,
    settings: TuneSettings,
    advance: Advance,
    *,
    registry: Registry | None = None,
    modes: ModeHost | None = None,
) -> NamedComposition:
    """Find weights for the data and save them as a named composition; the arguments are those of `run`.

    Raises:
        LoraRtError: the name is taken, or data, base or adapters can't be used.
    """
    registry, modes = _opened(job, registry, modes)
    check_composition_place(name, registry)
    lines = read_lines(job.data, *FIELDS)
    frozen, weights, references = open_job(job, registry, modes)
    with closing(frozen):
        tuned = tune(frozen, weights, job.items(lines, frozen.base), settings, lambda loss: advance("weights", loss))
        if not tuned.loss_after < tuned.loss_before:
            raise _no_better("weights", job, tuned.loss_before, min(tuned.losses))
        found = composition_of(name, references, frozen, tuned, data_sha256=digest_of(lines), seed=settings.seed)
        save_composition(registry.compositions, found)
        return found


def tune_mixture(
    job: Job,
    name: str,
    settings: MixSettings,
    advance: Advance,
    *,
    registry: Registry | None = None,
    modes: ModeHost | None = None,
) -> NamedComposition:
    """Fit what a mode decides by, and save it as a named composition; the arguments are those of `run`.

    Raises:
        LoraRtError: the name is taken, or mode, data, base or adapters can't be used.
    """
    registry, modes = _opened(job, registry, modes)
    modes.require(settings.mode)
    check_composition_place(name, registry)
    lines = read_lines(job.data, *FIELDS)
    frozen, weights, references = open_job(job, registry, modes)
    with closing(frozen):
        check_weights(weights, LEAST)
        items, aside = held_out(job.items(lines, frozen.base), settings.seed)
        fit = MixFit(frozen, name, weights, items, settings)
        told = fit.fit_classifier(aside, lambda loss: advance("classifier", loss), job.more(frozen.base))
        first, last, losses = fit.fit(aside, lambda loss: advance("gates", loss))
        if not last < first:
            raise _no_better("gates", job, first, min(losses), _told(*told) if told else "")
        metrics = {"nll_before": round(first, 4), "nll_after": round(last, 4)}
        if told:
            metrics |= {"registered": round(told[0], 4), "registered_by_chance": round(told[1], 4)}
        found, state = mixture_of(
            name,
            references,
            frozen,
            weights,
            fit,
            mode=settings.mode,
            data_sha256=digest_of(lines),
            seed=settings.seed,
            metrics=metrics,
        )
        save_composition(registry.compositions, found, state)
        return found


def fit_scenes(
    job: Job,
    out: Path | None,
    settings: SceneSettings,
    advance: Advance,
    *,
    registry: Registry | None = None,
    modes: ModeHost | None = None,
) -> Fitted:
    """Fit gates and classifier, and publish the adapters anew: into the store, or as folders in `out`.

    The arguments are those of `run`.

    Raises:
        LoraRtError: data, base or adapters can't be used, or a folder is there already.
        TuneError: an adapter's reference means other files than those that were loaded, before the fit or after it.
    """
    registry, modes = _opened(job, registry, modes)
    check_adapters_place(out, registry)
    lines = read_lines(job.data, *FIELDS, "scene_type")
    frozen, weights, references = open_job(job, registry, modes)
    with closing(frozen):
        check_weights(weights, LEAST)
        destinations = {name: Destination(registry, name, out and out / name, _SOURCE) for name in weights}
        for destination in destinations.values():
            destination.check()
        sources_of(frozen, references, weights)
        items, aside = held_out(job.items(lines, frozen.base), settings.seed)
        fit = SceneFit(frozen, weights, items, settings)
        fit.fit_classifier(lambda loss: advance("classifier", loss), job.more(frozen.base))
        registered, chance = fit.accuracy(aside)
        first, last, losses = fit.fit_best_gates(aside, lambda loss: advance("gates", loss))
        if not last < first:
            raise _no_better("gates", job, first, min(losses), _told(registered, chance))
        found = {"gates_nll_first": first, "gates_nll_last": last, "registered": registered}
        metrics = {what: round(number, 4) for what, number in found.items()}
        sources = sources_of(frozen, references, weights)
        return Fitted(_publish(destinations, sources, fit, metrics), registered, chance, first, last)


_SOURCE = "fitted here"


def _told(registered: float, chance: float) -> str:
    return f"; the classifier is right on {registered:.0%} of the held-out prompts, by chance it is on {chance:.0%}"


def _no_better(what: str, job: Job, start: float, seen: float, told: str = "") -> TuneError:
    text = f"no {what} on the way were better than the start on held-out examples ({start:.4f} nats per token; "
    text += f"the best step on the others had {seen:.4f}){told}; nothing is published"
    return TuneError(text, next_step=f"Give more examples than {job.data} has, or another --lr or --epochs")


def _publish(
    destinations: Mapping[str, Destination], sources: Mapping[str, Path], fit: SceneFit, metrics: Mapping[str, float]
) -> list[str]:
    """Write all adapters aside, then bring each to its place; what can't go there stays aside.

    Raises:
        StoreError: one can't be written or published; those that were written are kept.
    """

    def write(folder: Path) -> None:
        for name, source in sources.items():
            (folder / name).mkdir()
            write_fitted(source, folder / name, fit.states[name], metrics)

    kept = put_aside(write)
    places = []
    for name, destination in destinations.items():
        try:
            with storage_errors("the adapter"):
                places.append(destination.publish(kept / name)[1])
        except LoraRtError as error:
            text = f"the fit is done, but {name!r} is not published: {error.message}"
            there = f"Nothing is lost: all adapters are in {kept}; move them, or: lora-rt compose {kept / name}"
            raise StoreError(text, next_step=there, problems=error.problems) from error
    shutil.rmtree(kept, ignore_errors=True)
    return places
