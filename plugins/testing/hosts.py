"""Modes that are not installed: an entry point that gives an object at hand, and a host that has it."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import EntryPoint
from typing import Any

from lora_rt.plugins.manager import GROUP, ModeHost, load_modes
from lora_rt.registry.packages import points_of


class _Package:
    """As much of a Distribution as the manager reads."""

    def __init__(self, name: str, version: str) -> None:
        self.metadata = {"Name": name, "Version": version}


class InlinePoint(EntryPoint):
    """An entry point whose `load` calls a function instead of importing anything.

    Args:
        name: the mode's name.
        load: gives the plugin, or does what a broken one does.
        package, version: the package that it claims to come from.
        group: that of modes, or "lora_rt.plugins" for what is not a mode.
    """

    def __init__(
        self,
        name: str,
        load: Callable[[], object],
        package: str = "inline-mode",
        version: str = "1.0",
        group: str = GROUP,
    ) -> None:
        super().__init__(name, f"{package.replace('-', '_')}", group)
        vars(self).update(load=load, dist=_Package(package, version))  # entry points refuse assignment


def host_of(plugin: Any, name: str = "mine", *, builtin: bool = True) -> ModeHost:
    """A host with this module or object as a mode, beside the installed ones (or alone)."""
    others = [point for point in points_of(GROUP)[0] if point.name != name] if builtin else []
    return load_modes([*others, InlinePoint(name, lambda: plugin)], blocked=())
