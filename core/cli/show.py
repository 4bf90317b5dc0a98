"""`lora-rt show REF`: what a reference means here, and why; `lora-rt show --base B`: what a base has for adapters."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lora_rt.core.base.roles import ROLES, roles_of
from lora_rt.core.cli import options
from lora_rt.core.cli.console import out, print_json
from lora_rt.core.cli.session import session, starting
from lora_rt.core.cli.wrapping import show_table
from lora_rt.errors import UsageError
from lora_rt.registry.inspection import InspectedAdapter, inspect_adapter
from lora_rt.registry.registry import Registry
from lora_rt.registry.resolved import Resolved

if TYPE_CHECKING:
    from lora_rt.registry.compositions import NamedComposition, NamedTerm


def show(
    reference: Annotated[
        str | None, typer.Argument(metavar="[REF]", help="A name, org/repo, or a path; with @revision.")
    ] = None,
    base: Annotated[
        str | None, typer.Option("--base", help="Show the roles, layers and shapes of this base instead.")
    ] = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Show where an adapter or a named composition is and what it holds, or the layers of a base."""
    if (reference is None) == (base is None):
        raise UsageError("show takes one thing", next_step="Name an adapter, or a base with --base")
    if base is not None:
        _show_base(base, as_json)
        return
    assert reference is not None
    registry = session().registry
    named = registry.compositions.get(reference)
    facts = composition_facts(registry, named) if named is not None else _adapter_facts(registry, reference, offline)
    if as_json:
        print_json(facts)
        return
    show_table(out, ("", ""), [(key, _text(value)) for key, value in facts.items()])


def _show_base(text: str, as_json: bool) -> None:
    """Role -> layers -> shapes. A layer that serves several roles stands in each of them."""
    with starting():
        from lora_rt.core.export.outline import outline

    rows: dict[tuple[str, str, tuple[int, ...]], list[str]] = {}
    for name, shape in outline(text, quick=True).shapes.items():
        for role in roles_of(name) or ("",):
            rows.setdefault((role, re.sub(r"\.\d+(?=\.)", ".*", name), shape), []).append(name)
    order = {role: number for number, role in enumerate((*ROLES, ""))}
    found = sorted(rows.items(), key=lambda item: order[item[0][0]])
    if as_json:
        print_json([{"role": r or None, "modules": names, "shape": list(shape)} for (r, _, shape), names in found])
        return
    cells = [(r or "-", layer, str(len(names)), " x ".join(map(str, shape))) for (r, layer, shape), names in found]
    show_table(out, ("role", "layers", "count", "shape"), cells)


def _adapter_facts(registry: Registry, reference: str, offline: bool) -> dict[str, Any]:
    found = registry.find(reference, offline=offline)
    inspected = inspect_adapter(found.folder, name=found.name, sha256=found.digests.sha256_recorded)
    found = found.read(inspected.files)
    others = [item for item in registry.installed() if item.name == found.name and item.sha256 != found.sha256]
    return _facts(found, inspected, others)


def _facts(found: Resolved, inspected: InspectedAdapter, others: list[Resolved]) -> dict[str, Any]:
    card = inspected.card
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


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key}: {item}" for key, item in value.items())
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return "\n".join(term_text(item) for item in value)
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return "" if value is None else str(value)


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
