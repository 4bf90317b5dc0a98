"""What there is to know of what can be used by name, as JSON documents: for `list`, `show`, a server and a page."""

from __future__ import annotations

from typing import Any

from lora_rt.registry.compositions import NamedComposition, NamedTerm
from lora_rt.registry.errors import StoreError
from lora_rt.registry.inspection import inspect_adapter
from lora_rt.registry.registry import Registry


def everything_named(registry: Registry) -> list[dict[str, Any]]:
    """Adapters, then named compositions (they are used by name like one), then what is damaged: all of one shape."""
    rows = [item.document() for item in registry.installed()]
    rows += [_composition_row(registry, name) for name in registry.compositions.names()]
    # An adapter whose record in the store can't be read: nothing else may seem to have its name.
    return rows + [_row(item.name, source=_damaged(item.name)) for item in registry.store.records.damaged()]


def facts_of(registry: Registry, reference: str, *, offline: bool = False) -> dict[str, Any]:
    """All about one of them, in the order in which it is shown.

    Raises:
        LoraRtError: it is unknown, not reachable, or refused by the inspection.
    """
    named = registry.compositions.get(reference)
    return _of_adapter(registry, reference, offline) if named is None else _of_composition(registry, named)


def _row(name: str, **known: Any) -> dict[str, Any]:
    return {
        **dict.fromkeys(("name", "register", "mode", "base", "source", "revision", "sha256")),
        "name": name,
        **known,
    }


def _damaged(name: str) -> str:
    return f"damaged; see: lora-rt verify {name}"


def _composition_row(registry: Registry, name: str) -> dict[str, Any]:
    try:
        named = registry.compositions.look_up(name)
    except StoreError:
        named = None  # one that is damaged must not hide the others
    if named is None:
        return _row(name, mode="composition", source=_damaged(name))
    source = f"{registry.compositions.source(name)}: {named}"
    return _row(name, mode=named.mode or "composition", base=named.base, source=source, sha256=named.sha256)


def _of_adapter(registry: Registry, reference: str, offline: bool) -> dict[str, Any]:
    found = registry.find(reference, offline=offline)
    inspected = inspect_adapter(found.folder, name=found.name, sha256=found.digests.sha256_recorded)
    found, card = found.read(inspected.files), inspected.card
    others = [item for item in registry.installed() if item.name == found.name and item.sha256 != found.sha256]
    return {
        "name": found.name,
        "register": card.register if card else None,
        "mode": inspected.mode,
        "base": card.base.id if card else None,
        "source": found.source,
        "why": found.why,
        "revision": found.revision,
        "sha256": found.sha256,
        "folder": str(found.folder),
        "rank": sorted({module.rank for module in inspected.modules}),
        "modules": len(inspected.modules),
        "licence": card.licence if card else None,
        "scene_types": list(card.scene_types) if card else [],
        "metrics": dict(card.metrics) if card else {},
        "files": dict(inspected.files),
        "also": [f"{item.source}, for {item.card.base.id if item.card else 'any base'}" for item in others],
    }


def _of_composition(registry: Registry, named: NamedComposition) -> dict[str, Any]:
    """Its terms, what it was tuned on, and whether its adapters are the same."""
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
        "also": [f"an adapter of this name ({other}) is hidden by it" for other in registry.clashing(named.name)],
    }


def _term(term: NamedTerm) -> dict[str, Any]:
    facts = {"reference": term.reference, "weight": term.weight, "sha256": term.sha256}
    return {**facts, "layers": list(term.layers)} if term.layers else facts
