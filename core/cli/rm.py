"""`lora-rt rm NAME`: remove an adapter from the store."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from lora_rt.registry.errors import StoreError
    from lora_rt.registry.resolved import Resolved


def rm(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A name in the store.")],
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
) -> None:
    """Remove an adapter, for all bases, or a named composition from the store."""
    from rich.markup import escape

    from lora_rt.core.cli.console import err, out
    from lora_rt.registry.registry import Registry

    registry = Registry()
    is_mix = name in registry.compositions.names()  # a damaged one is removed like any other
    records = registry.store.records.named(name)
    if not records and not is_mix:
        raise _not_in_store(registry.installed(), name)
    sources = [f"{record.source} for {record.base or 'any base'}" for record in records]
    if not yes and not _agreed(name, ", ".join(["a composition"] * is_mix + sources)):
        err.print("nothing was removed")
        return
    if is_mix:
        registry.compositions.remove(name)
        out.print(f"removed the composition [bold]{escape(name)}[/]", soft_wrap=True)
    if not records:
        return
    for item in registry.store.remove(name):
        out.print(
            f"removed [bold]{escape(item.name)}[/] ({escape(item.source)}, sha256 {item.sha256[:12]})", soft_wrap=True
        )


def _agreed(name: str, what: str) -> bool:
    """Whether the person at the terminal says yes.

    Raises:
        StoreError: there is nobody to ask.
    """
    import sys

    from lora_rt.registry.errors import StoreError

    if not sys.stdin.isatty():
        raise StoreError(f"removing {name!r} needs a yes, and nobody can be asked", next_step=f"lora-rt rm {name} -y")
    return typer.confirm(f"Remove {name} ({what})?", err=True)


def _not_in_store(installed: list[Resolved], name: str) -> StoreError:
    from lora_rt.registry.errors import StoreError

    for item in installed:
        if item.name == name:
            return StoreError(f"{name!r} is not in the store: {item.why}", next_step="Remove it there")
    return StoreError(f"the store has no adapter {name!r}", next_step="lora-rt list")
