"""What is installed, and the host over all of it. Nothing is imported: each plugin is when it is first needed."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from importlib.metadata import EntryPoint

from lora_rt.plugins.manager.host import ModeHost
from lora_rt.plugins.manager.limits import time_limits
from lora_rt.plugins.manager.plugin import Plugin
from lora_rt.plugins.manager.record import GROUP, NAMELESS, OTHERS, OURS, PluginRecord, describe
from lora_rt.registry.packages import canonical, package_of, points_of

BLOCK_VARIABLE = "LORA_RT_BLOCK_PLUGINS"


def load_modes(
    points: Iterable[EntryPoint] | None = None,
    blocked: Iterable[str] | None = None,
    patience: float = math.inf,
) -> ModeHost:
    """The host.

    Args:
        points: entry points of plugins; those that are installed if left out.
        blocked: names or packages that are never imported; those in $LORA_RT_BLOCK_PLUGINS (comma-separated) if left
            out.
        patience: a bound in seconds on each import and each timed hook of this host.
    """
    found, unreadable = installed() if points is None else (list(points), [])
    limits = time_limits(patience)
    names = os.environ.get(BLOCK_VARIABLE, "").split(",") if blocked is None else blocked
    skip = {canonical(name.strip()) for name in names} - {""}
    plugins = [Plugin(point, limits) for point in in_order(found)]
    for plugin in plugins:
        if {canonical(plugin.record.name), canonical(plugin.record.package)} & skip:
            plugin.record.mark("blocked", f"named in {BLOCK_VARIABLE}")
    return ModeHost(plugins, unreadable, limits)


def installed() -> tuple[list[EntryPoint], list[PluginRecord]]:
    """Every entry point of the two groups, and a broken record of every package whose entry points can't be read."""
    points, unreadable = points_of(GROUP)
    records = []
    for item in unreadable:
        reason = describe(f"its entry points can't be read: {item.reason}")
        records.append(PluginRecord(NAMELESS, item.package, item.version, status="broken", reason=reason))
    return [*points, *points_of(OTHERS)[0]], records


def in_order(points: Iterable[EntryPoint]) -> list[EntryPoint]:
    """Ours first: a stranger's mode can then not take the name of a built-in one. The rest by name and package."""

    def key(point: EntryPoint) -> tuple[bool, str, str]:
        package = canonical(package_of(point)[0])
        return package != OURS, point.name, package

    return sorted(points, key=key)
