"""`lora-rt list`: every adapter that can be used by name, and where it comes from."""

from __future__ import annotations

from lora_rt.core.cli.console import err, out, print_json
from lora_rt.core.cli.options import Json
from lora_rt.core.cli.session import session
from lora_rt.core.cli.wrapping import show_table
from lora_rt.registry.facts import everything_named


def list_adapters(as_json: Json = False) -> None:
    """List the adapters that can be used by name."""
    rows = everything_named(session().registry)
    if as_json:
        print_json(rows)
        return
    if not rows:
        err.print("no adapters yet; pull one (lora-rt search) or train one (lora-rt train)")
        return
    shown = [column for column in rows[0] if any(row[column] for row in rows)]
    show_table(out, shown, [[row[column] or "" for column in shown] for row in rows])
