"""What a composition names, looked up and cautioned of before seconds are spent on loading a base."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape

from lora_rt.core.base.identity import identify_base
from lora_rt.core.base.progress import step
from lora_rt.core.cli.console import err, warn
from lora_rt.core.cli.session import session
from lora_rt.core.requests.activation import scene_turns
from lora_rt.core.requests.composition import Composition, Term
from lora_rt.core.requests.measured import outside
from lora_rt.core.requests.named import named_composition, raise_all
from lora_rt.errors import LoraRtError, UsageError
from lora_rt.registry.inspection import foreseen
from lora_rt.registry.reference import Reference
from lora_rt.registry.registry import Registry
from lora_rt.registry.resolved import Resolved

_NEUTRAL = "neutral"  # a scene that belongs to no type


def look_up(composition: Composition, base: str | None = None) -> list[Resolved]:
    """Whatever can be known of a composition's adapters before a base is fetched, converted or loaded.

    Names, cards, configurations, modes, and whether they are for the base that `--base` means. No weights of what is
    here are read; what only the Hub has is fetched first, since an adapter is small and a base is not.

    Returns:
        The adapters.

    Raises:
        LoraRtError: terms that can't be used; all of them are named.
    """
    opened = session()
    identity = None if base is None else identify_base(base)
    stated = None if opened.registry.allow_base_mismatch else identity
    adapters: list[Resolved] = []
    problems: list[LoraRtError] = []
    for reference in dict.fromkeys(r for term in composition.terms for r, _ in _references(term, opened.registry)):
        try:
            with step(f"looking up {reference.text}"):
                found = opened.registry.find(reference, identity)
            opened.modes.require(foreseen(found.folder, name=found.name, base=stated))
            adapters.append(found)
        except LoraRtError as error:
            problems.append(error)
    raise_all(problems, f"{len(problems)} terms can't be used")
    return adapters


def check_scene(scene: str | None, composition: Composition, adapters: Sequence[Resolved]) -> None:
    """What `--scene` or `/scene` says, against the scene types of whatever in use tells scenes apart.

    Where none does, that is said in a line: a mode may read scenes without telling them apart, but few do.

    Raises:
        LoraRtError: none of them has it.
    """
    if scene is None:
        return
    turns = scene_turns(scene) if "[" in scene else [(None, scene)]
    if not turns:
        raise UsageError(f"{scene!r} is not a scene", next_step="Write a scene type, or: logic body[So:]")
    opened = session()
    compositions = [named_composition(term, opened.registry.compositions) for term in composition.terms]
    cards = [item.card for item in adapters if item.card and opened.modes.implements(item.card.mode, "lora_rt_scene")]
    known = dict.fromkeys(kind for card in [*cards, *compositions] if card for kind in card.scene_types)
    unknown = [kind for _, kind in turns if kind not in (*known, _NEUTRAL)]
    if unknown and known:
        text = f"there is no scene type {' or '.join(map(repr, unknown))}"
        raise LoraRtError(text, next_step=f"The scene types here are: {', '.join(known)}")
    if unknown:
        text = f"no adapter in use tells scenes apart, so the scene type {scene} may change nothing"
        warn(text)


def caution(composition: Composition, base: str | None = None) -> None:
    """One line on standard error about weights that nobody measured: what comes of them may be no text at all.

    Once per kind: whoever turns a knob in a chat knows it then.
    """
    found = outside(_weights(composition), None if base is None else identify_base(base).id)
    if found.keys() - session().told - {"base"}:
        session().told.update(found)
        warn("; ".join(found.values()))


def normalized(composition: Composition, limit: float | None) -> Composition:
    """The composition with the sum of |weight| at most the limit, where there is one; says what it did.

    Raises:
        LoraRtError: the limit is not above 0.
    """
    if limit is None:
        return composition
    total = sum(abs(weight) for _, weight in _weights(composition))
    found = composition.normalized(limit, total)
    if found is not composition:
        told = f"normalized: the weights added up to {total:g}, each was multiplied by {limit / total:.4g}: {found}"
        err.print(f"[dim]{escape(told)}[/]", soft_wrap=not err.is_terminal)
    return found


def _weights(composition: Composition) -> list[tuple[str, float]]:
    registry = session().registry
    return [(r.text, weight) for term in composition.terms for r, weight in _references(term, registry)]


def _references(term: Term, registry: Registry) -> list[tuple[Reference, float]]:
    """The adapters of a term and their weights: its own, or those of a named composition."""
    named = named_composition(term, registry.compositions)
    if named is None:
        return [(term.reference, term.weight)]
    return [(Reference.parse(item.reference), term.weight * item.mean_weight) for item in named.terms]
