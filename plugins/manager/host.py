"""The loaded modes, and the calls of their hooks.

Only the plugin that owns a mode is called for it. One failed call costs that call: the request ends with an error that
names the plugin, and requests of other modes, and later ones of this mode, go on. What a request contains may be what
makes a gate fail, and in a service one user must not switch a mode off for all. Only a call that does not come back
disables its mode for the rest of the process, since each of them leaves a thread behind.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import pluggy

from lora_rt.errors import LoraRtError
from lora_rt.plugins.manager import failures, results
from lora_rt.plugins.manager.limits import Limits, within
from lora_rt.plugins.manager.record import PluginError, PluginRecord, UnknownModeError, describe
from lora_rt.plugins.manager.watch import Watch

if TYPE_CHECKING:
    from lora_rt.plugins.contract import (
        AdapterView,
        ComposeContext,
        Gate,
        GateContext,
        Objective,
        ObjectiveContext,
        SceneContext,
        ScenePrediction,
    )

Find = Callable[[str, Any], Any]
_GATE = "lora_rt_gate"
_ACTING = (_GATE, "lora_rt_compose")
_log = logging.getLogger("lora_rt.plugins")


class ModeHost:
    """The loaded modes. `records` has one entry per entry point, whatever became of it."""

    def __init__(self, manager: pluggy.PluginManager, records: list[PluginRecord], limits: Limits) -> None:
        """Use `load_modes`."""
        self.records = records
        self._manager = manager
        self._limits = limits
        self._mine = {record.name: record for record in records if record.usable}
        self._remembered = {name: record.reason for name, record in self._mine.items() if record.status == "faulty"}
        self._callers: dict[tuple[str, str], Any] = {}
        self._watch = Watch(limits[_GATE], self._late)

    @property
    def modes(self) -> list[str]:
        """Names of the modes that can be used, sorted."""
        return sorted(record.name for record in self.records if record.usable)

    def require(self, mode: str) -> None:
        """Raises UnknownModeError unless the mode can be used."""
        self._record(mode)

    def implements(self, mode: str, hook: str) -> bool:
        """Whether a mode implements a hook.

        Raises:
            UnknownModeError: there is no such mode, or it is broken or blocked.
        """
        return hook in self._record(mode).hooks

    def providers(self, hook: str) -> list[str]:
        """Names of the usable plugins that implement a hook, sorted."""
        return sorted(record.name for record in self.records if record.usable and hook in record.hooks)

    def acting_hooks(self, mode: str) -> list[str]:
        """The hooks by which a mode acts at inference: none is "static whatever the adapter".

        Raises:
            UnknownModeError: as `implements`.
        """
        return [hook for hook in _ACTING if self.implements(mode, hook)]

    def why_not_static(self, mode: str, view: AdapterView) -> str:
        """Why an adapter of a mode that acts at inference has no constant weights, "" where it has.

        Raises:
            UnknownModeError, PluginError: as `call`.
        """
        told = self._answer(mode, "lora_rt_static", results.checked_static, context=view)
        if told is None:
            return f"acts at inference ({', '.join(self.acting_hooks(mode))}) and does not say that this one is static"
        return f"acts at inference: {told}" if told else ""

    def gate(self, mode: str, context: GateContext) -> Gate | None:
        """The checked gate of one adapter for one forward pass. Runs in the caller's thread, without a time limit.

        Raises:
            UnknownModeError, PluginError: as `call`.
        """
        gate: Gate | None = self._answer(
            mode, _GATE, lambda value: results.checked_gate(value, context), context=context
        )
        return gate

    def scene(self, mode: str, context: SceneContext) -> ScenePrediction | None:
        """The checked scene types of the rows of a request, or None for none.

        Raises:
            UnknownModeError, PluginError: as `call`.
        """
        registration: ScenePrediction | None = self._answer(
            mode, "lora_rt_scene", lambda value: results.checked_registration(value, context), context=context
        )
        return registration

    def weights(self, mode: str, context: ComposeContext) -> list[float] | None:
        """The checked weights of a mode's terms, or None for the user's own.

        Raises:
            UnknownModeError, PluginError: as `call`.
        """
        weights: list[float] | None = self._answer(
            mode, "lora_rt_compose", lambda value: results.checked_weights(value, context), context=context
        )
        return weights

    def objective(self, mode: str, context: ObjectiveContext) -> Objective | None:
        """The checked objective of a training run. Its methods raise PluginError from now on when they fail.

        Raises:
            UnknownModeError, PluginError: as `call`.
        """
        hook = "lora_rt_objective"

        def blame(what: str, why: object) -> PluginError:
            return self.broke(mode, f"{hook}, {what}", why)

        objective: Objective | None = self._answer(
            mode, hook, lambda value: results.checked_objective(value, context, blame), context=context
        )
        return objective

    def sources(self) -> list[tuple[str, Find]]:
        """(label, find) of every registry source that plugins add; what fails is named in the log and left out."""
        found: list[tuple[str, Find]] = []
        for mode in self.providers("lora_rt_sources"):
            mine: list[tuple[str, Find]] = []
            try:
                self.call(mode, "lora_rt_sources", register=lambda label, find, mine=mine: mine.append((label, find)))
            except PluginError as error:
                _log.warning("%s", error.message)
                continue
            found += [(str(label), self._guarded(mode, find)) for label, find in mine]
        return found

    def call(self, mode: str, hook: str, **arguments: Any) -> Any:
        """The unchecked result of one hook of one mode, or None if the mode does not implement it.

        Raises:
            UnknownModeError: there is no such mode, or it is broken or blocked.
            PluginError: the hook raised, exited, or did not come back in time. A LoraRtError of the hook's own passes.
        """
        return self._answer(mode, hook, lambda value: value, **arguments)

    def broke(self, mode: str, hook: str, why: object) -> PluginError:
        """Note that a plugin failed in a hook, and give the error to raise; `why` is an exception or a text."""
        return self._failed(mode, hook, describe(why))

    def note(self, mode: str, reason: str) -> None:
        """Note something that a plugin offers and that is refused; the rest of it is used."""
        record = self._mine[mode]
        record.mark("faulty", "; ".join(filter(None, (record.reason, reason))))

    def _answer(self, mode: str, hook: str, check: Callable[[Any], Any], **arguments: Any) -> Any:
        if hook not in self._record(mode).hooks:
            return None
        run = self._in_this_thread if hook == _GATE else self._in_time
        value = run(mode, hook, self._caller(mode, hook), arguments)
        try:
            answer = check(value)
        except results.ResultError as error:
            raise self.broke(mode, hook, str(error)) from error
        if mode in self._remembered:
            self._recovered(mode, hook)
        return answer

    def _in_this_thread(self, mode: str, hook: str, caller: Any, arguments: dict[str, Any]) -> Any:
        try:
            with self._watch.over(mode, hook):
                return caller(**arguments)
        except (LoraRtError, KeyboardInterrupt):  # here a KeyboardInterrupt is the user's
            raise
        except BaseException as error:
            raise self.broke(mode, hook, error) from error

    def _in_time(self, mode: str, hook: str, caller: Any, arguments: dict[str, Any]) -> Any:
        seconds = self._limits[hook]
        outcome = within(seconds, lambda: caller(**arguments))
        if outcome.late:
            raise self._failed(mode, hook, f"not finished after {seconds:g} s", status="broken")
        if isinstance(outcome.error, LoraRtError):
            raise outcome.error
        if outcome.error is not None:
            raise self.broke(mode, hook, outcome.error) from outcome.error
        return outcome.value

    def _guarded(self, mode: str, find: Find) -> Find:
        """A source's `find` that gives a path or None whatever the plugin does; a LoraRtError of its own passes."""

        def guarded(name: str, base: Any) -> Any:
            if not self._mine[mode].usable:
                return None
            try:
                place = self._in_time(mode, "lora_rt_sources", partial(find, name, base), {})
                if place is not None and not isinstance(place, (str, os.PathLike)):
                    raise self.broke(mode, "lora_rt_sources", f"find returned a {type(place).__name__}, not a path")
            except PluginError as error:
                _log.warning("%s", error.message)
                return None
            return place

        return guarded

    def _caller(self, mode: str, hook: str) -> Any:
        if (mode, hook) not in self._callers:
            plugin = self._manager.get_plugin(mode)
            others = [other for other in self._manager.get_plugins() if other is not plugin]
            self._callers[mode, hook] = self._manager.subset_hook_caller(hook, remove_plugins=others)
        return self._callers[mode, hook]

    def _failed(self, mode: str, hook: str, why: str, *, status: Any = "faulty") -> PluginError:
        record = self._mine[mode]
        reason = f"{hook}: {why}"
        if record.reason != reason:  # a gate that fails in every request writes once
            failures.remember(record, hook, reason)
        record.mark(status, reason)
        self._remembered.pop(mode, None)
        return PluginError(
            f"the plugin {mode!r} ({record.origin}) failed in {reason}",
            next_step=f"Report it to its author; LORA_RT_BLOCK_PLUGINS={mode} keeps it from being loaded",
        )

    def _late(self, mode: str, hook: str) -> None:
        error = self._failed(mode, hook, f"has not come back for {self._limits[hook]:g} s")
        _log.warning("%s; stop the request with Ctrl-C", error.message)

    def _recovered(self, mode: str, hook: str) -> None:
        """What an earlier process left behind is forgotten once the same hook works; what failed here is kept."""
        if self._remembered[mode].startswith(hook):
            del self._remembered[mode]
            failures.forget(self._mine[mode])
            self._mine[mode].status, self._mine[mode].reason = "ok", ""

    def _record(self, mode: str) -> PluginRecord:
        record = self._mine.get(mode)
        if record is not None and record.usable:
            return record
        candidates: Sequence[PluginRecord] = [r for r in self.records if r.name == mode]
        if candidates:
            record = candidates[0]
            raise UnknownModeError(
                f"the mode {mode!r} of {record.origin} is {record.status}: {record.reason}",
                next_step="See: lora-rt plugins",
            )
        raise UnknownModeError(
            f"no plugin provides the mode {mode!r}; there are: {', '.join(self.modes) or 'none'}",
            next_step="Install the package that brings it with: lora-rt install PACKAGE",
        )
