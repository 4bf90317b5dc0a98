"""Whether a composition can be written down as weights at all.

A term that waits for a text has no constant weight. A mode may gate its adapters and decide their weights at inference;
whether it does so with these adapters is asked of its hooks, for both directions of a bridge and every scene type
that the adapters know. What they leave alone everywhere is static.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lora_rt.core.export.errors import ExportError
from lora_rt.core.export.outline import Outline
from lora_rt.core.export.terms import ExportTerm
from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import DIRECTIONS, ComposeContext, GateContext, SceneType, TermFacts, prompt_for
from lora_rt.plugins.manager import ModeHost

_TOKENS, _PROMPT = 6, 3


def check_static(terms: Sequence[ExportTerm], modes: ModeHost, base: Outline) -> tuple[list[str], list[LoraRtError]]:
    """Notes on adapters whose mode could act at inference and did not when asked; and terms that are not static."""
    failures: list[LoraRtError] = [_dynamic(t.name, f"it waits for {t.after!r}") for t in terms if t.after]
    notes = []
    for term in terms:
        try:
            why = _why_gated(term, modes, base) or _why_weighed(term, terms, modes, base)
        except LoraRtError as error:
            failures.append(error)
            continue
        if why:
            failures.append(_dynamic(term.name, why))
        elif any(modes.implements(term.adapter.mode, hook) for hook in ("lora_rt_gate", "lora_rt_compose")):
            notes.append(f"{term.name}: its mode {term.adapter.mode!r} can act at inference, and leaves this one alone")
    return notes, failures


def _dynamic(name: str, why: str) -> ExportError:
    return ExportError(
        f"{name!r} has no static equivalent: {why}", next_step="Use --static to export it as if it were always on"
    )


def _why_gated(term: ExportTerm, modes: ModeHost, base: Outline) -> str:
    """Why the adapter's contribution is not constant, by its mode's gate; empty where it is."""
    adapter = term.adapter
    if not modes.implements(adapter.mode, "lora_rt_gate"):
        return ""
    looked: list[bool] = []
    scenes, prompts = _trials([term])
    rows = len(scenes)

    def hidden() -> torch.Tensor:
        looked.append(True)
        return torch.zeros(rows, _TOKENS, base.facts.hidden_size)

    context = GateContext(
        adapter=adapter.name,
        card=adapter.card,
        state=adapter.state,
        base=base.facts,
        rank=adapter.rank,
        uniform_rank=len(adapter.ranks) == 1,
        input_ids=torch.zeros(rows, _TOKENS, dtype=torch.long),
        positions=torch.arange(_TOKENS).expand(rows, -1),
        prompt_lengths=torch.full((rows,), _PROMPT),
        active=[True] * rows,
        scene_types=scenes,
        prompts=prompts,
        hidden=hidden,
    )
    with torch.inference_mode():
        gate = modes.gate(adapter.mode, context)
    if gate is None and not looked:
        return ""
    return f"its mode {adapter.mode!r} gates it at inference"


def _why_weighed(term: ExportTerm, terms: Sequence[ExportTerm], modes: ModeHost, base: Outline) -> str:
    """Why the adapter's weight is not the user's, by its mode; empty where it is."""
    mode = term.adapter.mode
    if not modes.implements(mode, "lora_rt_compose"):
        return ""
    facts = [TermFacts(t.name, t.weight, t.adapter.mode, t.adapter.card, t.adapter.state) for t in terms]
    mine = [index for index, other in enumerate(terms) if other.adapter.mode == mode]
    own = mine.index(next(index for index, other in enumerate(terms) if other is term))
    for scene, prompt in zip(*_trials([terms[index] for index in mine]), strict=True):
        context = ComposeContext(terms=facts, mine=mine, prompt=prompt, scene_type=scene, base=base.facts)
        with torch.inference_mode():
            decided = modes.weights(mode, context)
        if decided is not None and decided[own] != term.weight:
            return f"its mode {mode!r} decides its weight at inference"
    return ""


def _trials(terms: Sequence[ExportTerm]) -> tuple[list[SceneType], list[str]]:
    """Scene types and prompts to ask about, pairwise: every scene type in both directions of a bridge."""
    known = dict.fromkeys(kind for term in terms for kind in term.adapter.card.get("scene_types", ()))
    pairs = [(scene, prompt_for(way, "x")) for scene in (None, *known) for way in DIRECTIONS]
    return [scene for scene, _ in pairs], [prompt for _, prompt in pairs]
