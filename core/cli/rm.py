"""`lora-rt rm NAME`: remove an adapter from the store."""

from __future__ import annotations

import sys
from difflib import get_close_matches
from typing import Annotated

import typer
from rich.markup import escape

from lora_rt.core.cli.console import err, out
from lora_rt.core.cli.session import session
from lora_rt.registry.errors import StoreError
from lora_rt.registry.project import LOCK_FILE
from lora_rt.registry.records import Record, read
from lora_rt.registry.reference import Reference, composed
from lora_rt.registry.registry import Registry

_ELSEWHERE = "A package goes with lora-rt uninstall, a name of a project with its line in lora-rt.toml"


def rm(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name in the store.")],
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
) -> None:
    """Remove an adapter (for all bases) or a named composition from the store."""
    registry, name = session().registry, composed(name)
    is_composition = name in registry.compositions.own_names()  # a damaged one is removed like any other
    records = [read(path) for path in registry.store.records.paths_of(name)]
    if not records and not is_composition:
        raise _not_in_store(registry, name)
    sources = [
        f"{record.source} for {record.base or 'any base'}" if isinstance(record, Record) else "a damaged record"
        for record in records
    ]
    users = [other for other in registry.compositions.with_adapter(name) if other != name] if records else []
    if users:
        are = "is a composition" if len(users) == 1 else "are compositions"
        err.print(f"{escape(', '.join(users))} {are} of {escape(name)}, and can't be used without it", soft_wrap=True)
    if not yes and not _agreed(name, ", ".join(["a composition"] * is_composition + sources)):
        err.print("nothing was removed")
        return
    if is_composition:
        registry.compositions.remove(name)
        out.print(f"removed the composition [bold]{escape(name)}[/]", soft_wrap=True)
    if not records:
        return
    removed = registry.store.remove(name)
    if not removed:
        out.print(f"removed the damaged record of [bold]{escape(name)}[/]", soft_wrap=True)
    for item in removed:
        out.print(f"removed [bold]{escape(item.name)}[/] ({escape(item.source)}, sha256 {item.sha256})", soft_wrap=True)


def _agreed(name: str, what: str) -> bool:
    """Whether the person at the terminal says yes.

    Raises:
        StoreError: there is nobody to ask.
    """
    if not sys.stdin.isatty():
        text = f"removing {name!r} must be confirmed, and this is not a terminal where you can be asked"
        raise StoreError(text, next_step=f"Run: lora-rt rm {name} -y")
    return typer.confirm(f"Remove {name} ({what})?", err=True)


def _not_in_store(registry: Registry, name: str) -> StoreError:
    Reference.parse(name)  # what could never be a name is a mistake of another kind
    if name in registry.compositions.names():
        packaged = registry.compositions.source(name)
        place = packaged if packaged.startswith("shipped") else f"of {LOCK_FILE}"
        return StoreError(f"{name!r} is a composition {place}", next_step=_ELSEWHERE)
    for item in registry.installed():
        if item.name == name:
            return StoreError(f"{name!r} is not in the store: {item.why}", next_step=_ELSEWHERE)
    near = get_close_matches(
        name, [*registry.compositions.own_names(), *(item.name for item in registry.installed())], 1
    )
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return StoreError(f"the store has no adapter {name!r}{hint}", next_step="See: lora-rt list")
