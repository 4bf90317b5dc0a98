"""`lora-rt search [WORD]`: adapters on the Hub."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from lora_rt.core.cli.console import err, out, print_json
from lora_rt.core.cli.options import Json
from lora_rt.core.cli.wrapping import show_table
from lora_rt.registry.hub.search import search as run


def search(
    word: Annotated[str, typer.Argument(metavar="WORD", help="Part of a name.")] = "",
    base: Annotated[str | None, typer.Option("--base", help="Only adapters of this base, a hub id.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Any PEFT adapter, not only those made with lora-rt.")] = False,
    as_json: Json = False,
) -> None:
    """Search the Hub for adapters."""
    with err.status("asking the Hub"):
        found = run(word, base=base, every=every)
    if as_json:
        print_json([dataclasses.asdict(item) for item in found])
        return
    if not found:
        err.print("nothing found" if every else "nothing found; --all looks at every PEFT adapter")
        return
    rows = [(item.repo, item.register, item.mode, item.base, f"{item.downloads:,}") for item in found]
    show_table(out, ("repository", "register", "mode", "base", "downloads"), rows)
