"""`lora-rt show REF`: what a reference means here, and why."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lora_rt.core.cli import options
from lora_rt.core.cli.console import out, print_json
from lora_rt.core.cli.session import session
from lora_rt.core.cli.show_composition import composition_facts, term_text
from lora_rt.core.cli.wrapping import show_table
from lora_rt.registry.inspection import InspectedAdapter, inspect_adapter
from lora_rt.registry.registry import Registry
from lora_rt.registry.resolved import Resolved


def show(
    reference: Annotated[str, typer.Argument(metavar="REF", help="A name, org/repo, or a path; with @revision.")],
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Show an adapter or a named composition: where it is, which rule led there, and what it holds."""
    registry = session().registry
    named = registry.compositions.get(reference)
    facts = composition_facts(registry, named) if named is not None else _adapter_facts(registry, reference, offline)
    if as_json:
        print_json(facts)
        return
    show_table(out, ("", ""), [(key, _text(value)) for key, value in facts.items()])


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
