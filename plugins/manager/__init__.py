"""Finds plugins, imports each when it is first needed, isolates the broken ones, and calls the hooks of exactly one.

    loading.py    which entry points are installed, in which order they count, and the host over all of them
    host.py       who owns which mode; the calls of hooks, with what they may see and may return
    sources.py    where plugins find adapters
    plugin.py     one plugin: its import and its calls, given up after a time limit
    record.py     what is known of one plugin, for people, also from earlier processes; what is raised in its name
    surface.py    what a plugin offers: its API version, its hooks, their arguments
    copies.py     what hooks get to see is theirs
    results.py    what hooks may return; what holds tensors: tensors.py
    limits.py     how long a plugin may take; names a gate that does not come back

Importing this package has no effect; `load_modes()` returns a host, which imports nothing before it is asked.
"""

from lora_rt.plugins.manager.host import ModeHost
from lora_rt.plugins.manager.limits import SECONDS_VARIABLE
from lora_rt.plugins.manager.loading import BLOCK_VARIABLE, load_modes
from lora_rt.plugins.manager.plugin import Plugin
from lora_rt.plugins.manager.record import GROUP, OTHERS, PluginError, PluginRecord, UnknownModeError
from lora_rt.plugins.manager.sources import each

__all__ = [
    "BLOCK_VARIABLE",
    "GROUP",
    "OTHERS",
    "SECONDS_VARIABLE",
    "ModeHost",
    "Plugin",
    "PluginError",
    "PluginRecord",
    "UnknownModeError",
    "each",
    "load_modes",
]
