"""Where plugins find adapters: registry sources that give a path or nothing, whatever the plugin does."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, TypeVar

from lora_rt.plugins.manager.plugin import Plugin
from lora_rt.plugins.manager.record import PluginError

Find = Callable[[str, Any], Any]
T = TypeVar("T")
_SOURCES = "lora_rt_sources"
_log = logging.getLogger("lora_rt.plugins")


class Sources(Sequence[tuple[str, Find]]):
    """The sources of plugins; what fails is named in the log and left out."""

    def __init__(self, offering: Callable[[], Sequence[Plugin]]) -> None:
        """`offering` finds the plugins that add sources; it is called when they are first looked at."""
        self._offering = offering

    @cached_property
    def _found(self) -> list[tuple[str, Find]]:
        return [source for found in each(self._offering(), _sources_of) for source in found]

    def __getitem__(self, index: Any) -> Any:
        return self._found[index]

    def __len__(self) -> int:
        return len(self._found)


def _sources_of(plugin: Plugin) -> list[tuple[str, Find]]:
    mine: list[tuple[str, Find]] = []
    try:
        plugin.ask(_SOURCES, register=lambda label, find: mine.append((str(label), _guarded(plugin, find))))
    except PluginError as error:
        _log.warning("%s", error.message)
        return []
    return mine


def _guarded(plugin: Plugin, find: Find) -> Find:
    """A source's `find` that gives a path or None whatever the plugin does; a LoraRtError of its own passes."""

    def guarded(name: str, base: Any) -> Any:
        if not plugin.record.usable:
            return None
        try:
            place = plugin.timed(_SOURCES, lambda: find(name, base))
            if place is not None and not isinstance(place, (str, os.PathLike)):
                raise plugin.broke(_SOURCES, f"find returned a {type(place).__name__}, not a path")
        except PluginError as error:
            _log.warning("%s", error.message)
            return None
        return place

    return guarded


def each(plugins: Sequence[Plugin], ask: Callable[[Plugin], T]) -> list[T]:
    """Ask several plugins at once, each within its own time limit, so that all take no longer than the slowest."""
    if not plugins:
        return []
    with ThreadPoolExecutor(len(plugins)) as pool:
        return list(pool.map(ask, plugins))
