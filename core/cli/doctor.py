"""`lora-rt doctor`: what is installed, where things are, what is broken, and what to do about each."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from importlib import metadata
from typing import Annotated, Literal

import typer
from rich.text import Text

from lora_rt.core.cli.console import out, print_json
from lora_rt.core.cli.options import Json
from lora_rt.core.cli.plugin_commands import examined_modes
from lora_rt.core.cli.session import session, starting
from lora_rt.core.cli.wrapping import show_table
from lora_rt.plugins.manager import PluginRecord
from lora_rt.plugins.manager.record import NAMELESS
from lora_rt.registry.health import Check, registry_checks
from lora_rt.version import __version__

PACKAGES = ("torch", "transformers", "bitsandbytes", "peft", "accelerate", "huggingface_hub", "safetensors", "gguf")


def doctor(
    clean: Annotated[bool, typer.Option("--clean", help="Remove the files that killed processes left behind.")] = False,
    as_json: Json = False,
) -> None:
    """Check versions, devices, the home, bases, plugins and adapters, and look for left-over files."""
    modes = examined_modes()
    checks = [*_versions(), *_devices(), *registry_checks(session().registry, clean=clean), *_plugins(modes.records)]
    if as_json:
        print_json([dataclasses.asdict(check) for check in checks])
    else:
        _print(checks)
    if any(check.status == "broken" for check in checks):
        raise typer.Exit(1)


def _print(checks: list[Check]) -> None:
    colours = {"ok": "green", "note": "yellow", "broken": "red"}
    rows = [(check.name, Text(check.status, style=colours[check.status]), check.detail, check.todo) for check in checks]
    show_table(out, ("what", "status", "found", "what to do"), rows)


def _versions() -> list[Check]:
    checks = [Check("lora-rt", "ok", f"{__version__}, Python {platform.python_version()}")]
    for package in PACKAGES:
        try:
            checks.append(Check(package, "ok", metadata.version(package)))
        except metadata.PackageNotFoundError:
            checks.append(Check(package, "broken", "is not installed", "pip install --upgrade lora-rt"))
    return checks


def _devices() -> list[Check]:
    with starting():
        import torch

        from lora_rt.core.multiply import fastest, measured

    checks = [Check("cpu", "ok", f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}")]
    known = measured.remembered().get(measured.machine_name(), {})
    checks += _products(fastest.told(known) if known else {})
    if not torch.cuda.is_available():
        return [
            *checks,
            Check("cuda", "note", "no device", "Nothing, unless there is one: then install a CUDA build of torch"),
        ]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        checks.append(Check(f"cuda:{index}", "ok", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"))
    return checks


def _products(told: Mapping[str, str]) -> list[Check]:
    """How the layers of the bases that were used here are multiplied on the CPU, and what a dense copy of one takes."""
    if not told:
        return [
            Check("multiplying", "note", "not measured yet", "Nothing: it is when a base is first loaded on the CPU")
        ]
    return [Check(f"multiplying {name}", "ok", words) for name, words in told.items()]


def _plugins(records: list[PluginRecord]) -> list[Check]:
    checks = []
    for record in records:
        if record.name == NAMELESS:
            continue  # its package is named already
        if record.status == "ok":
            checks.append(Check(f"mode {record.name}", "ok", f"{record.package} {record.version}"))
        else:
            status: Literal["note", "broken"] = "note" if record.status == "blocked" else "broken"
            todo = f"Update or uninstall {record.package}, or block it: LORA_RT_BLOCK_PLUGINS={record.name}"
            checks.append(Check(f"mode {record.name}", status, f"{record.status}: {record.reason}", todo))
    return checks
