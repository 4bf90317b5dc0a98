"""`lora-rt plugins`: which modes are installed, what they implement, and what is wrong with the broken ones."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer


def plugins(as_json: Annotated[bool, typer.Option("--json", help="One JSON document on standard output.")] = False) -> None:
    """List the installed modes and what became of them."""
    from lora_rt.core.cli.console import out, print_json
    from lora_rt.plugins.manager import load_modes

    records = load_modes().records
    if as_json:
        print_json([dataclasses.asdict(record) for record in records])
        return
    from rich.table import Table

    table = Table("mode", "package", "version", "hooks", "status")
    for record in records:
        hooks = " ".join(name.removeprefix("lora_rt_") for name in record.hooks)
        status = "[green]ok[/]" if record.status == "ok" else f"[red]{record.status}[/]: {record.reason}"
        table.add_row(record.name, record.package, record.version, hooks, status)
    out.print(table)
