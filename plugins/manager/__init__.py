"""Loads mode plugins, isolates the broken ones, and calls the hooks of exactly one mode.

    finding.py    which entry points are installed, in which order they count
    loading.py    each imported alone, in a thread that is given up after a time limit
    surface.py    what a plugin offers: its API version, its hooks, their arguments
    host.py       the loaded modes, and the calls of their hooks
    results.py    what hooks may return
    limits.py     how long a plugin may take
    watch.py      names a gate that does not come back
    failures.py   what went wrong in earlier processes, kept so that `lora-rt plugins` can tell

Importing this package has no effect; `load_modes()` returns a host, with a record of every entry point.
"""

from lora_rt.plugins.manager.finding import GROUP
from lora_rt.plugins.manager.host import ModeHost
from lora_rt.plugins.manager.limits import SECONDS_VARIABLE
from lora_rt.plugins.manager.loading import BLOCK_VARIABLE, load_modes
from lora_rt.plugins.manager.record import PluginError, PluginRecord, UnknownModeError

__all__ = [
    "BLOCK_VARIABLE",
    "GROUP",
    "SECONDS_VARIABLE",
    "ModeHost",
    "PluginError",
    "PluginRecord",
    "UnknownModeError",
    "load_modes",
]
