"""One installed plugin: its import, when it is first needed, and the calls of its hooks.

One failed call costs that call: the request ends with an error that names the plugin, and requests of other modes, and
later ones of this mode, go on. What a request contains may be what makes a gate fail, and in a service one user must
not switch a mode off for all. Only a call that does not come back disables its plugin for the rest of the process,
since each of them leaves a thread behind.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from importlib.metadata import EntryPoint
from threading import Lock
from types import ModuleType
from typing import Any, TypeVar

import pluggy

from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import hooks
from lora_rt.plugins.manager.limits import IMPORT, watched, within
from lora_rt.plugins.manager.record import PluginError, PluginRecord, Status, describe, forget, recall, remember
from lora_rt.plugins.manager.results import ResultError
from lora_rt.plugins.manager.surface import SurfaceError, hooks_of, summary_of
from lora_rt.registry.packages import package_of

UNTIMED = ("lora_rt_gate", "lora_rt_joint_gate")
"""Hooks of the hot path: they run in the request's own thread."""

shared_thread: ContextVar[list[tuple[Plugin, str]] | None] = ContextVar("shared_thread", default=None)
"""Set in a thread that several calls share and that is given up as a whole: the calls that were made, the last last."""

T = TypeVar("T")
_log = logging.getLogger("lora_rt.plugins")


def _anything(value: Any) -> Any:
    return value


class Plugin:
    """`record` says what became of it; its hooks are known after `load`."""

    def __init__(self, point: EntryPoint, limits: Mapping[str, float]) -> None:
        self.record = PluginRecord(point.name, *package_of(point))
        self.group = point.group
        self._point = point
        self._limits = limits
        self._lock = Lock()
        self._relay: Any = None
        self._remembered = ""

    @property
    def name(self) -> str:
        """Of the entry point; for a mode, the mode's."""
        return self.record.name

    def load(self) -> PluginRecord:
        """Import it where that has not happened yet; the record says how that went."""
        with self._lock:
            if self._relay is None and self.record.usable:
                self._import()
        return self.record

    def implements(self, hook: str) -> bool:
        """Whether it can be used and has this hook."""
        return self.load().usable and hook in self.record.hooks

    @property
    def fields(self) -> tuple[str, ...]:
        """What the module of its objective states as `LORA_RT_FIELDS`; empty where it states none."""
        if not self.implements("lora_rt_objective"):
            return ()
        (implementation,) = self._relay.hook.lora_rt_objective.get_hookimpls()
        stated = getattr(implementation.function, "__globals__", {}).get("LORA_RT_FIELDS", ())
        return stated if isinstance(stated, tuple) and all(isinstance(name, str) for name in stated) else ()

    def ask(self, hook: str, check: Callable[[Any], T] = _anything, **arguments: Any) -> T | None:
        """The checked result of one hook, None where it is not implemented or has nothing to say.

        Raises:
            PluginError: it raised, exited, did not come back in time, or returned what it may not. A LoraRtError of the
                hook's own passes.
        """
        if not self.implements(hook):
            return None
        action = partial(getattr(self._relay.hook, hook), **arguments)
        if hook in UNTIMED:
            with watched(self._limits[hook], partial(self._late, hook)):
                value = self._here(hook, action)
        else:
            value = self.timed(hook, action)
        try:
            answer = None if value is None else check(value)
        except ResultError as error:
            raise self.broke(hook, str(error)) from error
        if self._remembered.startswith(hook):  # what an earlier process left behind; what failed here is kept
            self._remembered = ""
            forget(self.record)
            self.record.status, self.record.reason = "ok", ""
        return answer

    def timed(self, hook: str, action: Callable[[], Any]) -> Any:
        """Run some code of the plugin's in a thread that is given up after the time limit of a hook.

        Raises:
            PluginError, LoraRtError: as `ask`.
        """
        calls = shared_thread.get()
        if calls is not None:
            calls.append((self, hook))
            return self._here(hook, action)
        outcome = within(self._limits[hook], action)
        if outcome.late:
            raise self.gave_up(hook)
        if isinstance(outcome.error, LoraRtError):
            raise outcome.error
        if outcome.error is not None:
            raise self.broke(hook, outcome.error) from outcome.error
        return outcome.value

    def gave_up(self, hook: str) -> PluginError:
        """Note that a hook did not come back."""
        return self._failed(hook, f"not finished after {self._limits[hook]:g} s", status="broken")

    def broke(self, hook: str, why: object) -> PluginError:
        """Note that it failed in a hook, and give the error to raise; `why` is an exception or a text."""
        return self._failed(hook, describe(why))

    def note(self, reason: str) -> None:
        """Note something that it offers and that is refused; the rest of it is used."""
        self.record.mark("faulty", "; ".join(filter(None, (self.record.reason, reason))))

    def _here(self, hook: str, action: Callable[[], Any]) -> Any:
        # In a thread of ours a KeyboardInterrupt is the plugin's own; in the request's it is the user's.
        users = (LoraRtError,) if shared_thread.get() is not None else (LoraRtError, KeyboardInterrupt)
        try:
            return action()
        except users:
            raise
        except BaseException as error:
            raise self.broke(hook, error) from error

    def _import(self) -> None:
        seconds = self._limits[IMPORT]
        with _printing_aside():
            outcome = within(seconds, self._looked_at)
        if outcome.late:
            self.record.mark("broken", f"import: not finished after {seconds:g} s")
        elif isinstance(outcome.error, SurfaceError):
            self.record.mark("broken", outcome.error.message)
        elif outcome.error is not None:
            self.record.mark("broken", f"import: {describe(outcome.error)}")
        else:
            self._relay, self.record.hooks, self.record.summary = outcome.value
            self._remembered = recall(self.record)
            if self._remembered:
                self.record.mark("faulty", self._remembered)

    def _looked_at(self) -> tuple[pluggy.PluginManager, tuple[str, ...], str]:
        """What calls its hooks, their names, and what it is for. All of that may run its code, and is timed."""
        plugin = self._point.load()
        found = hooks_of(plugin, self.group)
        relay = pluggy.PluginManager("lora_rt")
        relay.add_hookspecs(hooks)
        surface = ModuleType(self.name)  # of the hooks alone: pluggy then never touches the plugin's other attributes
        vars(surface).update(found)
        relay.register(surface, name=self.name)
        return relay, tuple(sorted(found)), summary_of(plugin, self.name)

    def _failed(self, hook: str, why: str, *, status: Status = "faulty") -> PluginError:
        reason = f"{hook}: {why}"
        if self.record.reason != reason:  # a gate that fails in every request writes once
            remember(self.record, reason)
        self.record.mark(status, reason)
        self._remembered = ""
        return PluginError(
            f"the plugin {self.name!r} ({self.record.origin}) failed in {reason}",
            next_step=f"Report it to its author; LORA_RT_BLOCK_PLUGINS={self.name} keeps it from being loaded",
        )

    def _late(self, hook: str) -> None:
        error = self._failed(hook, f"has not come back for {self._limits[hook]:g} s")
        _log.warning("%s; stop the request with Ctrl-C", error.message)


_imports = 0
_imports_lock = Lock()
_stdout: Any = None


@contextmanager
def _printing_aside() -> Iterator[None]:
    """What a module prints while it is imported must not get into the JSON of a command; several may be at once."""
    global _imports, _stdout
    with _imports_lock:
        _imports += 1
        if _imports == 1:
            _stdout, sys.stdout = sys.stdout, sys.stderr
    try:
        yield
    finally:
        with _imports_lock:
            _imports -= 1
            if _imports == 0:
                sys.stdout = _stdout
