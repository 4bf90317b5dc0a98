"""`lora-rt sync`: install exactly what `lora-rt.lock` says."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from lora_rt.core.cli import options
from lora_rt.core.cli.console import out, print_json, transfer
from lora_rt.core.cli.session import session
from lora_rt.registry.lock import read_locked_compositions
from lora_rt.registry.project import LOCK_FILE
from lora_rt.registry.sync import sync as run


def sync(
    frozen: Annotated[bool, typer.Option("--frozen", help="Refuse to change the lock.")] = False,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Install exactly the adapters and compositions of the lock; without --frozen, first bring it up to date."""
    registry = session().registry
    with transfer() as report:
        found, changed = run(registry, frozen=frozen, offline=offline, report=report)
    compositions = read_locked_compositions(registry.folder)
    if as_json:
        names = [item.name for item in compositions]
        print_json({"changed": changed, "adapters": [item.document() for item in found], "compositions": names})
        return
    if changed:
        out.print(f"{LOCK_FILE} was brought up to date")
    for item in found:
        out.print(f"[bold]{escape(item.name)}[/] {escape(item.source)} sha256 {item.sha256}", soft_wrap=True)
    for composition in compositions:
        out.print(f"[bold]{escape(composition.name)}[/] composition {escape(str(composition))}", soft_wrap=True)
