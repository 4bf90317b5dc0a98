"""`lora-rt install`: packages that bring modes, into the environment of the running Python."""

from __future__ import annotations

import re
from typing import Annotated

import typer
from rich.text import Text

from lora_rt.core.cli import pip
from lora_rt.core.cli.console import out
from lora_rt.core.cli.pip import Brought

# What is not ours goes to pip as it is: `lora-rt install --upgrade PACKAGE`, `--index-url URL`, `--editable FOLDER`.
SETTINGS = {"ignore_unknown_options": True, "allow_interspersed_args": False}


def install(
    packages: Annotated[
        list[str],
        typer.Argument(metavar="PACKAGE", help="Names, folders, wheels or URLs, and options of pip."),
    ],
) -> None:
    """Install plugin packages with pip, and say which modes and adapters they brought."""
    before = pip.brought()
    changed = pip.install(packages)
    after = pip.brought()
    # Packages that were there already are none that pip installed now, but they are what was asked for.
    asked = pip.of_packages(after, [*changed, *_names(packages)])
    _report(sorted((after - before) | asked, key=lambda thing: (thing.kind, thing.name)), packages)


def _names(arguments: list[str]) -> list[str]:
    """The package names among pip's arguments: "fade-in-mode==0.1" is fade-in-mode."""
    matches = (re.match(r"[A-Za-z0-9]([\w.-]*\w)?(?=$|[\s=<>!~;\[@])", argument) for argument in arguments)
    return [match[0] for match in matches if match]


def _report(things: list[Brought], packages: list[str]) -> None:
    if not things:
        raise pip.PipError(
            f"pip has installed {' '.join(packages)}, which brings no mode and no adapter",
            next_step="Check the name; python -m pip uninstall removes what is not wanted",
        )
    records = {(record["name"], record["package"]): record for record in pip.mode_records()}
    broken = []
    for thing in things:
        origin = f"{thing.kind} {thing.name} ({thing.package} {thing.version})"
        record = records.get((thing.name, thing.package)) if thing.kind in ("mode", "plugin") else None
        if record is None or record["status"] == "ok":
            out.print(Text(f"{origin}: ready"), soft_wrap=True)
        else:
            broken.append(f"{origin} is {record['status']}: {record['reason']}")
    if broken:
        raise pip.PipError(
            "it is installed, but not all of it works", problems=broken, next_step="See: lora-rt plugins"
        )
