"""Which modes are installed: entry points of the group `lora_rt.modes`, without importing what they name."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib.metadata import Distribution, EntryPoint, distributions, entry_points

from lora_rt.plugins.manager.record import PluginRecord, describe

GROUP = "lora_rt.modes"
OURS = "lora-rt"


def installed(group: str = GROUP) -> tuple[list[EntryPoint], list[PluginRecord]]:
    """Every entry point of the group, and a broken record of every package whose entry points can't be read."""
    try:
        return list(entry_points(group=group)), []
    except Exception:
        # One malformed entry_points.txt anywhere on the path fails the whole query: ask package by package.
        return _one_by_one(distributions(), group)


def canonical(name: str) -> str:
    """A package's name in the form in which two spellings of it are equal (PyPA's name normalization)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def package_of(point: EntryPoint) -> tuple[str, str]:
    """Name and version of the package that brings an entry point."""
    return _identity(point.dist) if point.dist is not None else ("unknown", "")


def in_order(points: Iterable[EntryPoint]) -> list[EntryPoint]:
    """Ours first: a stranger's mode can then not take the name of a built-in one. The rest by name and package."""

    def key(point: EntryPoint) -> tuple[bool, str, str]:
        package = canonical(package_of(point)[0])
        return package != OURS, point.name, package

    return sorted(points, key=key)


def _one_by_one(packages: Iterable[Distribution], group: str) -> tuple[list[EntryPoint], list[PluginRecord]]:
    points: list[EntryPoint] = []
    unreadable: list[PluginRecord] = []
    seen: set[str] = set()
    for package in packages:
        name, version = _identity(package)
        if canonical(name) in seen:  # a later folder of the path holds another version, which Python does not use
            continue
        seen.add(canonical(name))
        try:
            points += package.entry_points.select(group=group)
        except Exception as error:
            reason = f"its entry points can't be read: {describe(error)}"
            unreadable.append(PluginRecord("?", name, version, status="broken", reason=reason))
    return points, unreadable


def _identity(package: Distribution) -> tuple[str, str]:
    """Name and version; packages with damaged metadata have neither."""
    try:
        return str(package.metadata["Name"] or "unknown"), str(package.metadata["Version"] or "")
    except Exception as error:
        return "unknown", f"({describe(error)})"
