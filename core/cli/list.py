"""`lora-rt list`: every adapter that can be used by name, and where it comes from."""

from __future__ import annotations

from lora_rt.core.cli.console import err, out, print_json
from lora_rt.core.cli.options import Json
from lora_rt.core.cli.session import session
from lora_rt.core.cli.wrapping import show_table
from lora_rt.registry.errors import StoreError
from lora_rt.registry.registry import Registry


def list_adapters(as_json: Json = False) -> None:
    """List the adapters that can be used by name."""
    registry = session().registry
    rows = [item.document() for item in registry.installed()]
    compositions = [_composition_row(registry, name) for name in registry.compositions.names()]
    compositions += [_damaged_row(item.name) for item in registry.store.records.damaged()]
    if as_json:
        print_json(rows + compositions)
        return
    if not rows + compositions:
        err.print("no adapters yet; pull one (lora-rt search) or train one (lora-rt train)")
        return
    rows += compositions
    shown = [column for column in rows[0] if any(row[column] for row in rows)]
    show_table(out, shown, [[row[column] or "" for column in shown] for row in rows])


def _composition_row(registry: Registry, name: str) -> dict[str, str | None]:
    """A named composition (`lora-rt tune`) among the adapters: it is used by name like one."""
    try:
        named = registry.compositions.look_up(name)
    except StoreError:
        named = None  # one that is damaged must not hide the others
    return {
        "name": name,
        "register": None,
        "mode": (named.mode if named else "") or "composition",
        "base": named.base if named else None,
        "source": f"{registry.compositions.source(name)}: {named}" if named else f"damaged; see: lora-rt verify {name}",
        "revision": None,
        "sha256": named.sha256 if named else None,
    }


def _damaged_row(name: str) -> dict[str, str | None]:
    """An adapter whose record in the store can't be read: nothing else may seem to have its name."""
    row = dict.fromkeys(("name", "register", "mode", "base", "source", "revision", "sha256"))
    return {**row, "name": name, "source": f"damaged; see: lora-rt verify {name}"}
