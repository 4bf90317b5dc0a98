"""`lora-rt verify [NAME...]`: is what is installed still what was installed?"""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from lora_rt.core.cli.console import err, out, print_json
from lora_rt.core.cli.options import Json
from lora_rt.core.cli.session import session
from lora_rt.core.cli.wrapping import show_table
from lora_rt.registry.verify import verify as run


def verify(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="Names; everything that is installed if left out.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Do not ask the Hub whether tags moved.")] = False,
    as_json: Json = False,
) -> None:
    """Check that adapters and named compositions are sound, and unchanged since they were installed."""
    registry = session().registry
    with err.status("comparing files" if offline else "comparing files and asking the Hub"):
        verdicts = run(registry, names or (), offline=offline)
    if as_json:
        print_json([item.document() for item in verdicts])
    else:
        rows = []
        for item in verdicts:
            status = Text("\n".join([*(item.problems or ["ok"]), *item.notes]), "red" if item.problems else "green")
            rows.append((item.name, item.source, status, item.todo))
        show_table(out, ("name", "source", "status", "what to do"), rows)
    if any(item.problems for item in verdicts):
        raise typer.Exit(1)
