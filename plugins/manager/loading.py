"""The host over everything that is installed. Nothing is imported here: each plugin is when it is first needed."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from importlib.metadata import EntryPoint

from lora_rt.plugins.manager.finding import in_order, installed
from lora_rt.plugins.manager.host import ModeHost
from lora_rt.plugins.manager.limits import Limits
from lora_rt.plugins.manager.plugin import Plugin
from lora_rt.registry.packages import canonical

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
    limits = Limits(patience)
    names = os.environ.get(BLOCK_VARIABLE, "").split(",") if blocked is None else blocked
    skip = {canonical(name.strip()) for name in names} - {""}
    plugins = [Plugin(point, limits) for point in in_order(found)]
    for plugin in plugins:
        if {canonical(plugin.record.name), canonical(plugin.record.package)} & skip:
            plugin.record.mark("blocked", f"named in {BLOCK_VARIABLE}")
    return ModeHost(plugins, unreadable, limits)
