"""`lora-rt lock`: pin a project's adapters in `lora-rt.lock`."""

from __future__ import annotations

from typing import Annotated

import typer

from lora_rt.core.cli import options
from lora_rt.core.cli.console import out, print_json, transfer
from lora_rt.core.cli.session import session
from lora_rt.registry.errors import ProjectError
from lora_rt.registry.lock import read_locked_compositions
from lora_rt.registry.project import LOCK_FILE
from lora_rt.registry.sync import check_lock, make_lock


def lock(
    check: Annotated[bool, typer.Option("--check", help="Only say whether the lock fits; change nothing.")] = False,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Pin the project's adapters to full commits and the sha256 of each file, and its compositions."""
    registry = session().registry
    if check:
        problems = check_lock(registry)
        if as_json:
            print_json({"fits": not problems, "problems": problems})
        if problems and as_json:
            raise typer.Exit(1)
        if problems:
            raise ProjectError(f"{LOCK_FILE} does not fit", next_step="Run: lora-rt lock", problems=problems)
        if not as_json:
            out.print(f"{LOCK_FILE} fits")
        return
    with transfer() as report:
        entries, changed = make_lock(registry, offline=offline, report=report)
    compositions = read_locked_compositions(registry.folder)
    if as_json:
        adapters = [entry.name for entry in entries]
        print_json({"changed": changed, "adapters": adapters, "compositions": [item.name for item in compositions]})
        return
    count = f"{len(entries)} adapters" + (f", {len(compositions)} compositions" if compositions else "")
    out.print(f"{LOCK_FILE}: {count}{'' if changed else ', unchanged'}")
