"""What is installed: entry points of two groups, without importing what they name."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import EntryPoint

from lora_rt.plugins.manager.record import PluginRecord, describe
from lora_rt.registry.packages import canonical, package_of, points_of

GROUP = "lora_rt.modes"
OTHERS = "lora_rt.plugins"
OURS = "lora-rt"
NAMELESS = "?"


def installed() -> tuple[list[EntryPoint], list[PluginRecord]]:
    """Every entry point of the two groups, and a broken record of every package whose entry points can't be read."""
    points, unreadable = points_of(GROUP)
    records = [
        PluginRecord(NAMELESS, item.package, item.version, (), "broken", describe(f"{_UNREADABLE}: {item.reason}"))
        for item in unreadable
    ]
    return [*points, *points_of(OTHERS)[0]], records


def in_order(points: Iterable[EntryPoint]) -> list[EntryPoint]:
    """Ours first: a stranger's mode can then not take the name of a built-in one. The rest by name and package."""

    def key(point: EntryPoint) -> tuple[bool, str, str]:
        package = canonical(package_of(point)[0])
        return package != OURS, point.name, package

    return sorted(points, key=key)


_UNREADABLE = "its entry points can't be read"
