"""pip of the running Python, and what packages bring for lora-rt: modes and adapters, read from their metadata."""

from __future__ import annotations

import importlib
import json
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

from lora_rt.core.base.progress import step
from lora_rt.errors import LoraRtError
from lora_rt.plugins.manager import GROUP as MODES
from lora_rt.plugins.manager import OTHERS
from lora_rt.registry.packages import canonical, package_of, points_of
from lora_rt.registry.shipped import GROUP as ADAPTERS

ENGINES = "lora_rt.engines"
"""The group of entry points of what `lora-rt serve --engine` takes besides our own."""


class PipError(LoraRtError):
    """pip is not there, or could not do what it was asked for."""


@dataclass(frozen=True, slots=True)
class Brought:
    """One thing that an installed package brings: a mode, another plugin, an adapter or an engine."""

    kind: str
    name: str
    package: str
    version: str


def brought() -> set[Brought]:
    """Everything that the packages that are on the disk now bring; nothing is imported."""
    importlib.invalidate_caches()
    kinds = {"mode": MODES, "plugin": OTHERS, "adapter": ADAPTERS, "engine": ENGINES}
    return {
        Brought(kind, point.name, *package_of(point)) for kind, group in kinds.items() for point in points_of(group)[0]
    }


def of_packages(things: set[Brought], packages: Sequence[str]) -> set[Brought]:
    """Those that come from these packages, however their names are spelled."""
    wanted = {canonical(package) for package in packages}
    return {thing for thing in things if canonical(thing.package) in wanted}


def install(arguments: Sequence[str]) -> list[str]:
    """Run `pip install` and return the names of the packages that it installed, dependencies included.

    Raises:
        PipError: pip failed; the message has its last error.
    """
    with tempfile.TemporaryDirectory(prefix="lora-rt-") as folder:
        report = Path(folder) / "report.json"
        _pip("install", ["--no-input", "--report", str(report)], arguments)
        content = json.loads(report.read_text(encoding="utf-8"))
    return [str(item["metadata"]["name"]) for item in content["install"]]


def uninstall(packages: Sequence[str]) -> None:
    """Run `pip uninstall`.

    Raises:
        PipError: pip failed; the message has its last error.
    """
    _pip("uninstall", ["--yes"], packages)


def mode_records() -> list[dict[str, Any]]:
    """What a new process says of the modes: this one has loaded its own, and can't unload them.

    Raises:
        PipError: it does not start any more.
    """
    command = [sys.executable, "-m", "lora_rt", "plugins", "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=False)
    try:
        records: list[dict[str, Any]] = json.loads(ended.stdout) if not ended.returncode else []
    except ValueError as error:
        text = "lora-rt plugins --json prints no JSON any more: one of the plugins prints something as Python ends"
        raise PipError(text, next_step="See: lora-rt plugins") from error
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["no output"])[-1]
        raise PipError(
            f"lora-rt does not start any more: {last}", next_step="Check the packages with: python -m pip check"
        )
    return records


def _pip(verb: str, quietly: Sequence[str], arguments: Sequence[str]) -> None:
    """Run pip, behind a spinner; of what it prints, its own errors are told where it fails."""
    # Not util.find_spec: setuptools' import hook answers that name by throwing distutils out of this process.
    if PathFinder.find_spec("pip") is None:
        raise PipError("this Python has no pip", next_step=f"Get it with: {sys.executable} -m ensurepip")
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", verb, *quietly, *arguments]
    with step(f"pip {verb}"):
        ended = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
        )
    if ended.returncode:
        lines = [line.rstrip() for line in ended.stdout.splitlines() if line.strip()]
        # A build's own complaint stands before pip's last words, which only say that something failed.
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        raise PipError(
            f"pip {verb} failed: {(errors or lines or ['it says nothing'])[-1]}",
            next_step=f"See all that it says with: {shlex.join([sys.executable, '-m', 'pip', verb, *arguments])}",
        )
