"""`lora-rt uninstall`: packages that bring modes, out of the environment of the running Python."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.text import Text

from lora_rt.core.cli import pip
from lora_rt.core.cli.console import out
from lora_rt.core.cli.pip import Brought
from lora_rt.plugins.manager.record import OURS
from lora_rt.registry.packages import canonical
from lora_rt.registry.registry import Registry


def uninstall(
    packages: Annotated[list[str], typer.Argument(metavar="PACKAGE", help="Packages that bring modes or adapters.")],
) -> None:
    """Uninstall plugin packages with pip, and say which modes and adapters went.

    Only packages that bring modes or adapters are touched, and never lora-rt itself.
    """
    before = pip.brought()
    _check(packages, before)
    pip.uninstall(packages)
    gone = before - pip.brought()
    for thing in sorted(gone, key=lambda thing: (thing.kind, thing.name)):
        out.print(Text(f"{thing.kind} {thing.name} ({thing.package} {thing.version}): gone"), soft_wrap=True)
        for adapter in _left_without(thing):
            out.print(Text(f"  the adapter {adapter} needs it and can't be used until it is back"), soft_wrap=True)
    kept = pip.of_packages(before - gone, packages)
    if kept:
        names = ", ".join(sorted({thing.package for thing in kept}))
        raise pip.PipError(
            f"pip left {names} where it is", next_step="It belongs to another environment; remove it there"
        )


def _check(packages: list[str], things: set[Brought]) -> None:
    """Refuse what is no plugin: pip would remove torch just as readily."""
    problems = []
    for package in packages:
        if canonical(package) == OURS:
            problems.append(f"{package} is lora-rt itself")
        elif not pip.of_packages(things, [package]):
            problems.append(_no_plugin(package, things))
    if problems:
        raise pip.PipError(
            problems[0] if len(problems) == 1 else f"{len(problems)} of these can't be uninstalled",
            problems=problems if len(problems) > 1 else (),
            next_step="See: lora-rt plugins; other packages go with: python -m pip uninstall",
        )


def _no_plugin(package: str, things: set[Brought]) -> str:
    owners = sorted({thing.package for thing in things if thing.name == package})
    if owners:
        return f"{package} is not a package; it comes from the package {owners[0]}"
    return f"no package {package} that brings a mode or an adapter is installed"


def _left_without(thing: Brought) -> list[str]:
    """Adapters whose mode has gone."""
    if thing.kind != "mode":
        return []
    return sorted({item.name for item in Registry().installed() if item.card and item.card.mode == thing.name})
