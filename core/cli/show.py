"""`lora-rt show REF`: what a reference means here, and why; `lora-rt show --base B`: what a base has for adapters."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lora_rt.core.base.roles import anywhere
from lora_rt.core.cli import options
from lora_rt.core.cli.console import out, print_json
from lora_rt.core.cli.session import session, starting
from lora_rt.core.cli.wrapping import show_table
from lora_rt.errors import UsageError
from lora_rt.registry.facts import facts_of


def show(
    reference: Annotated[
        str | None, typer.Argument(metavar="REF", help="A name, org/repo, or a path; with @revision.")
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
    facts = facts_of(session().registry, reference, offline=offline)
    if as_json:
        print_json(facts)
        return
    show_table(out, ("", ""), [(key, _text(value)) for key, value in facts.items()])


def _show_base(text: str, as_json: bool) -> None:
    with starting():
        from lora_rt.core.export.outline import outline

    rows = outline(text, quick=True).document()
    if as_json:
        print_json(rows)
        return
    cells = [
        (row["role"] or "-", anywhere(row["modules"][0]), str(len(row["modules"])), " x ".join(map(str, row["shape"])))
        for row in rows
    ]
    show_table(out, ("role", "layers", "count", "shape"), cells)


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key}: {item}" for key, item in value.items())
    if isinstance(value, list) and any(isinstance(item, dict) for item in value):
        return "\n".join(_term_text(item) for item in value)
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return "" if value is None else str(value)


def _term_text(term: dict[str, Any]) -> str:
    """One term in one line."""
    layers = term.get("layers")
    per = f", {len(layers)} layers from {min(layers):.3f} to {max(layers):.3f}" if layers else ""
    return f"{term['reference']}:{term['weight']:.4g}{per}, sha256 {term['sha256']}"
