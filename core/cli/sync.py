"""`lora-rt sync`: install exactly what `lora-rt.lock` says."""

from __future__ import annotations

from typing import Annotated

import typer

from lora_rt.core.cli.options import Json


def sync(
    frozen: Annotated[bool, typer.Option("--frozen", help="Refuse to change the lock.")] = False,
    offline: Annotated[bool, typer.Option("--offline", help="Make no request.")] = False,
    as_json: Json = False,
) -> None:
    """Install exactly the adapters of the lock; without --frozen, bring the lock up to date with the project first."""
    from rich.markup import escape

    from lora_rt.core.cli.console import out, print_json
    from lora_rt.core.cli.transfer import transfer
    from lora_rt.registry.project import LOCK_FILE
    from lora_rt.registry.registry import Registry
    from lora_rt.registry.sync import sync as run

    with transfer() as report:
        found, changed = run(Registry(), frozen=frozen, offline=offline, report=report)
    if as_json:
        rows = [{"name": i.name, "source": i.source, "revision": i.revision, "sha256": i.sha256} for i in found]
        print_json({"changed": changed, "adapters": rows})
        return
    if changed:
        out.print(f"{LOCK_FILE} was brought up to date")
    for item in found:
        out.print(f"[bold]{escape(item.name)}[/] {escape(item.source)} sha256 {item.sha256[:12]}", soft_wrap=True)
