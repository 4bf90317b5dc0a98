"""Which modes are installed: entry points of the group `lora_rt.modes`, without importing what they name."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import EntryPoint

from lora_rt.plugins.manager.record import PluginRecord, describe
from lora_rt.registry.packages import Unreadable, canonical, package_of, points_of

GROUP = "lora_rt.modes"
OURS = "lora-rt"
NAMELESS = "?"


def installed(group: str = GROUP) -> tuple[list[EntryPoint], list[PluginRecord]]:
    """Every entry point of the group, and a broken record of every package whose entry points can't be read."""
    points, unreadable = points_of(group)
    return points, [_record(item) for item in unreadable]


def in_order(points: Iterable[EntryPoint]) -> list[EntryPoint]:
    """Ours first: a stranger's mode can then not take the name of a built-in one. The rest by name and package."""

    def key(point: EntryPoint) -> tuple[bool, str, str]:
        package = canonical(package_of(point)[0])
        return package != OURS, point.name, package

    return sorted(points, key=key)


def _record(item: Unreadable) -> PluginRecord:
    reason = describe(f"its entry points can't be read: {item.reason}")
    return PluginRecord(NAMELESS, item.package, item.version, status="broken", reason=reason)
