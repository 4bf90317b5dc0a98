"""`lora-rt plugins`: which modes are installed, what they implement, and what is wrong with those that have a fault."""

from __future__ import annotations

import dataclasses

from rich.text import Text

from lora_rt.core.cli import options
from lora_rt.core.cli.console import out, print_json
from lora_rt.core.cli.plugin_commands import examined_modes
from lora_rt.core.cli.wrapping import Cell, show_table
from lora_rt.plugins.manager import PluginRecord

_COLOURS = {"ok": "green", "faulty": "yellow", "broken": "red", "blocked": "dim"}


def plugins(as_json: options.Json = False) -> None:
    """List the installed plugins, and what is wrong with those that can't be used.

    A faulty plugin is used, but something that it did failed or was refused; a broken one is not used.
    """
    records = examined_modes().records
    if as_json:
        print_json([dataclasses.asdict(record) for record in records])
    else:
        _table(records)


def _table(records: list[PluginRecord]) -> None:
    rows: list[tuple[Cell, ...]] = []
    for record in records:
        hooks = " ".join(name.removeprefix("lora_rt_") for name in record.hooks)
        status = Text(record.status, style=_COLOURS[record.status])
        # Text, not strings: a stranger chose these words, and rich would read brackets in them as markup.
        rows.append((record.name, record.summary, record.package, record.version, hooks, status))
    show_table(out, ("mode", "what it is for", "package", "version", "hooks", "status"), rows)
    for record in records:
        if record.status != "ok":
            out.print(Text(f"{record.name} ({record.origin}) is {record.status}: {record.reason}"), soft_wrap=True)
