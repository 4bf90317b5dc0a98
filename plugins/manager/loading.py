"""Imports every installed mode alone, so that one that raises, exits or hangs costs only itself."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from importlib.metadata import EntryPoint
from types import ModuleType

import pluggy

from lora_rt.plugins.contract import hooks
from lora_rt.plugins.manager import failures
from lora_rt.plugins.manager.finding import in_order, installed
from lora_rt.plugins.manager.host import ModeHost
from lora_rt.plugins.manager.limits import IMPORT, Limits, within
from lora_rt.plugins.manager.record import PluginRecord, describe
from lora_rt.plugins.manager.surface import Hook, SurfaceError, hooks_of
from lora_rt.registry.packages import canonical, package_of

BLOCK_VARIABLE = "LORA_RT_BLOCK_PLUGINS"


def load_modes(
    points: Iterable[EntryPoint] | None = None,
    blocked: Iterable[str] | None = None,
    patience: float = math.inf,
) -> ModeHost:
    """Load every installed mode.

    Args:
        points: entry points to load; those of the group `lora_rt.modes` if left out.
        blocked: modes or packages that are never imported; those in $LORA_RT_BLOCK_PLUGINS (comma-separated) if left
            out.
        patience: a bound in seconds on each import and each timed hook of this host.
    """
    found, unreadable = installed() if points is None else (list(points), [])
    limits = Limits(patience)
    skip = {canonical(name) for name in (_blocked_by_environment() if blocked is None else blocked)}
    manager = pluggy.PluginManager("lora_rt")
    manager.add_hookspecs(hooks)
    records: list[PluginRecord] = []
    for point in in_order(found):
        record = PluginRecord(point.name, *package_of(point))
        if {canonical(record.name), canonical(record.package)} & skip:
            record.mark("blocked", f"named in {BLOCK_VARIABLE}")
        else:
            _load(manager, point, record, records, limits)
        records.append(record)
    return ModeHost(manager, records + unreadable, limits)


def _load(
    manager: pluggy.PluginManager,
    point: EntryPoint,
    record: PluginRecord,
    earlier: list[PluginRecord],
    limits: Limits,
) -> None:
    twin = next((r for r in earlier if r.name == record.name and r.usable), None)
    if twin is not None:
        record.mark("broken", f"the mode name {record.name!r} is taken by {twin.origin}")
        return
    found = _import(point, limits[IMPORT])
    if isinstance(found, str):
        record.mark("broken", found)
        return
    _register(manager, record, found)
    failure = failures.recall(record) if record.usable else None
    if failure is not None:
        record.mark("faulty", failure.reason)


def _import(point: EntryPoint, seconds: float) -> dict[str, Hook] | str:
    """The hooks of a plugin, or why there are none. Looking at it runs its code as well, so it is timed as well."""
    # What a module prints while it is imported must not get into the JSON of a command.
    with redirect_stdout(sys.stderr):
        outcome = within(seconds, lambda: hooks_of(point.load()))
    if outcome.late:
        return f"import: not finished after {seconds:g} s"
    if isinstance(outcome.error, SurfaceError):
        return outcome.error.message
    if outcome.error is not None:
        return f"import: {describe(outcome.error)}"
    found: dict[str, Hook] = outcome.value
    return found


def _register(manager: pluggy.PluginManager, record: PluginRecord, found: dict[str, Hook]) -> None:
    """Hand pluggy a module of the hooks alone: it then never touches the plugin's other attributes."""
    surface = ModuleType(record.name)
    vars(surface).update(found)
    try:
        manager.register(surface, name=record.name)
    except (pluggy.PluginValidationError, ValueError) as error:
        record.mark("broken", describe(error))
        return
    record.hooks = tuple(sorted(found))


def _blocked_by_environment() -> list[str]:
    return [name.strip() for name in os.environ.get(BLOCK_VARIABLE, "").split(",") if name.strip()]
