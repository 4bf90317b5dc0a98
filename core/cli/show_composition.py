"""`lora-rt show` of a named composition: its terms, what it was tuned on, and whether its adapters are the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lora_rt.registry.compositions import NamedComposition, NamedTerm
    from lora_rt.registry.registry import Registry


def composition_facts(registry: Registry, named: NamedComposition) -> dict[str, Any]:
    """What there is to know of it, in the order in which it is shown."""
    hidden = [f"an adapter of this name ({source}) is hidden by it" for source in registry.clashing(named.name)]
    source = registry.compositions.source(named.name)
    of_mode = {"options": dict(named.card), "scene_types": list(named.scene_types), "state": named.state}
    return {
        "name": named.name,
        "mode": named.mode or "composition",
        "base": named.base,
        "source": source,
        "why": f"{named.name!r} is a composition {'in the store' if source == 'tuned here' else source}",
        "sha256": named.sha256,
        "terms": [_term(term) for term in named.terms],
        **(of_mode if named.mode else {}),
        "metrics": dict(named.metrics),
        "data_sha256": named.data_sha256,
        "seed": named.seed,
        "problems": registry.composition_problems(named),
        "also": hidden,
    }


def _term(term: NamedTerm) -> dict[str, Any]:
    facts = {"reference": term.reference, "weight": term.weight, "sha256": term.sha256}
    return {**facts, "layers": list(term.layers)} if term.layers else facts


def term_text(term: dict[str, Any]) -> str:
    """One term in one line."""
    layers = term.get("layers")
    per = f", {len(layers)} layers from {min(layers):.3f} to {max(layers):.3f}" if layers else ""
    return f"{term['reference']}:{term['weight']:.4g}{per}, sha256 {term['sha256']}"
