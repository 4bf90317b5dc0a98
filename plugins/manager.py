"""Loads mode plugins, isolates the broken ones, and calls the hooks of exactly one mode.

Loading is a function that returns a host; importing this module has no effect. Every entry point is loaded alone, in a
thread that is given up after a time limit, so that a plugin that raises, exits or hangs costs only itself.
"""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import Any

import pluggy

from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import LORA_RT_API, hooks

GROUP = "lora_rt.modes"
BLOCK_VARIABLE = "LORA_RT_BLOCK_PLUGINS"
LOAD_SECONDS = 10.0


class PluginError(LoraRtError):
    """A plugin broke its contract; the message names the plugin, the hook and the reason."""


class UnknownModeError(LoraRtError):
    """No plugin that works provides this mode."""


@dataclass(slots=True)
class PluginRecord:
    """What became of one entry point. `status` is "ok", "blocked" or "broken"; `reason` is empty when ok."""

    name: str
    package: str
    version: str
    hooks: tuple[str, ...] = ()
    status: str = "ok"
    reason: str = ""


class ModeHost:
    """The loaded modes. `records` has one entry per entry point, whatever became of it."""

    def __init__(self, manager: pluggy.PluginManager, records: list[PluginRecord]) -> None:
        self._manager = manager
        self.records = records

    @property
    def modes(self) -> list[str]:
        """Names of the modes that can be used, sorted."""
        return sorted(record.name for record in self.records if record.status == "ok")

    def call(self, mode: str, hook: str, **arguments: Any) -> Any:
        """The result of one hook of one mode, or None if the mode does not implement it.

        Raises:
            UnknownModeError: there is no such mode, or it is broken or blocked.
            PluginError: the hook raised or exited.
        """
        record = self._record(mode)
        if hook not in record.hooks:
            return None
        plugin = self._manager.get_plugin(mode)
        others = [p for p in self._manager.get_plugins() if p is not plugin]
        caller = self._manager.subset_hook_caller(hook, remove_plugins=others)
        try:
            return caller(**arguments)
        except LoraRtError:
            raise
        except (Exception, SystemExit) as error:
            raise self.broke(mode, hook, error) from error

    def broke(self, mode: str, hook: str, error: object) -> PluginError:
        """Note that a plugin broke its contract and give the error to raise."""
        record = self._record(mode)
        reason = f"{hook}: {_describe(error)}"
        record.reason = reason
        record.status = "broken"
        return PluginError(
            f"the plugin {mode!r} ({record.package} {record.version}) failed in {reason}",
            next_step=f"Report it to its author, or set {BLOCK_VARIABLE}={mode}",
        )

    def providers(self, hook: str) -> list[str]:
        """Names of the working plugins that implement a hook, sorted."""
        return sorted(r.name for r in self.records if r.status == "ok" and hook in r.hooks)

    def _record(self, mode: str) -> PluginRecord:
        candidates = [r for r in self.records if r.name == mode]
        working = [r for r in candidates if r.status == "ok"]
        if working:
            return working[0]
        if candidates:
            record = candidates[0]
            raise UnknownModeError(
                f"the mode {mode!r} of {record.package} {record.version} is {record.status}: {record.reason}",
                next_step="See: lora-rt plugins",
            )
        raise UnknownModeError(
            f"no plugin provides the mode {mode!r}; there are: {', '.join(self.modes) or 'none'}",
            next_step="Install the package that brings it with: lora-rt install PACKAGE",
        )


def load_modes(points: Iterable[EntryPoint] | None = None, blocked: Iterable[str] | None = None) -> ModeHost:
    """Load every installed mode.

    Args:
        points: entry points to load; those of the group `lora_rt.modes` if left out.
        blocked: names that are never imported; those in $LORA_RT_BLOCK_PLUGINS (comma-separated) if left out.
    """
    manager = pluggy.PluginManager("lora_rt")
    manager.add_hookspecs(hooks)
    found = entry_points(group=GROUP) if points is None else points
    skip = set(_blocked_by_environment() if blocked is None else blocked)
    records: list[PluginRecord] = []
    # Ours first: a stranger's mode can then not take the name of a built-in one.
    for point in sorted(found, key=lambda p: (_package(p) != "lora-rt", p.name, _package(p))):
        record = PluginRecord(point.name, _package(point), point.dist.version if point.dist else "")
        records.append(record)
        if point.name in skip:
            record.status, record.reason = "blocked", f"named in {BLOCK_VARIABLE}"
            continue
        try:
            _register(manager, point, record, records)
        except LoraRtError as error:
            record.status, record.reason = "broken", error.message
    return ModeHost(manager, records)


def _register(manager: pluggy.PluginManager, point: EntryPoint, record: PluginRecord, records: list[PluginRecord]) -> None:
    twins = [r for r in records if r is not record and r.name == record.name and r.status == "ok"]
    if twins:
        raise LoraRtError(f"the mode name {record.name!r} is taken by {twins[0].package} {twins[0].version}")
    plugin = _within(LOAD_SECONDS, point.load, "import")
    _check_api(plugin)
    implemented = _implemented(plugin)
    known = {name for name in vars(hooks) if name.startswith("lora_rt_")}
    unknown = [name for name in implemented if name not in known]
    if unknown:
        raise LoraRtError(f"no hook is called {', '.join(unknown)}; the hooks are {', '.join(sorted(known))}")
    if not implemented:
        raise LoraRtError("it implements no hook (is a function missing its @hookimpl?)")
    try:
        manager.register(plugin, name=point.name)
    except Exception as error:  # pluggy raises several kinds for a wrong signature
        if manager.has_plugin(point.name):
            manager.unregister(name=point.name)
        raise LoraRtError(_describe(error)) from error
    record.hooks = tuple(sorted(implemented))


def _check_api(plugin: object) -> None:
    module = plugin if isinstance(plugin, ModuleType) else inspect.getmodule(plugin)
    version = getattr(plugin, "LORA_RT_API", getattr(module, "LORA_RT_API", None))
    if version is None:
        raise LoraRtError(f"it does not state LORA_RT_API; this lora-rt has version {LORA_RT_API}")
    if version != LORA_RT_API:
        raise LoraRtError(f"it was written for LORA_RT_API {version}, and this lora-rt has {LORA_RT_API}")


def _implemented(plugin: object) -> list[str]:
    """Hook names that the plugin implements, misspelled ones included: all that carries our hookimpl marker."""
    names = []
    for name in dir(plugin):
        if getattr(getattr(plugin, name, None), "lora_rt_impl", None):
            names.append(name)
    return names


def _within(seconds: float, action: Callable[[], Any], what: str) -> Any:
    """Run `action` in a thread and give it up after a while: a hanging import can't be stopped, only left behind."""
    outcome: dict[str, Any] = {}

    def work() -> None:
        try:
            outcome["value"] = action()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=work, daemon=True, name="lora-rt-plugin")
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise LoraRtError(f"{what}: still not finished after {seconds:g} s")
    if "error" in outcome:
        raise LoraRtError(f"{what}: {_describe(outcome['error'])}") from outcome["error"]
    return outcome["value"]


def _describe(error: object) -> str:
    if isinstance(error, BaseException):
        text = " ".join(str(error).split())
        return f"{type(error).__name__}: {text}" if text else type(error).__name__
    return str(error)


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "unknown"


def _blocked_by_environment() -> list[str]:
    return [name.strip() for name in os.environ.get(BLOCK_VARIABLE, "").split(",") if name.strip()]
