"""`lora-rt list`: every adapter that can be used by name, and where it comes from."""

from __future__ import annotations

from lora_rt.core.cli.options import Json


def list_adapters(as_json: Json = False) -> None:
    """List the adapters that can be used by name."""
    from lora_rt.core.cli.console import err, out, print_json
    from lora_rt.registry.registry import Registry

    items = Registry().installed()
    rows = [
        {
            "name": item.name,
            "register": item.card.register if item.card else None,
            "mode": item.card.mode if item.card else "output-only",
            "base": item.card.base.id if item.card else None,
            "source": item.source,
            "revision": item.revision,
            "sha256": item.sha256,
        }
        for item in items
    ]
    if as_json:
        print_json(rows)
        return
    if not rows:
        err.print("no adapters yet; pull one (lora-rt search) or train one (lora-rt train)")
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table("name", "register", "mode", "base", "source", "revision", "sha256")
    for row in rows:
        short = {**row, "revision": (row["revision"] or "")[:12], "sha256": (row["sha256"] or "")[:12]}
        table.add_row(*(escape(value or "") for value in short.values()))
    out.print(table)
