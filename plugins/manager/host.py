"""Who owns which mode, and the calls of the hooks of exactly one of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from lora_rt.plugins.contract import JointGateContext
from lora_rt.plugins.manager.copies import private
from lora_rt.plugins.manager.limits import within
from lora_rt.plugins.manager.plugin import UNTIMED, Plugin, shared_thread
from lora_rt.plugins.manager.record import GROUP, PluginError, PluginRecord, UnknownModeError
from lora_rt.plugins.manager.results import checked_static, checked_weights
from lora_rt.plugins.manager.sources import Sources, each

if TYPE_CHECKING:
    from lora_rt.plugins.contract import (
        AdapterView,
        ComposeContext,
        Gate,
        GateContext,
        Mixture,
        MixtureContext,
        Objective,
        ObjectiveContext,
        SceneContext,
        ScenePrediction,
    )

T = TypeVar("T")
_COMPOSE = "lora_rt_compose"
_ACTING = (*UNTIMED, _COMPOSE)


class ModeHost:
    """The plugins. A mode is imported when it is asked for; `records`, `modes` and `offering` look at all of them.

    Whatever is asked of one mode raises UnknownModeError where there is none of that name that can be used; and what
    calls its hook PluginError, where that raised, exited, did not come back in time, or returned what it may not. A
    LoraRtError of the hook's own passes.
    """

    def __init__(
        self, plugins: Sequence[Plugin], unreadable: Sequence[PluginRecord], limits: Mapping[str, float]
    ) -> None:
        """Use `load_modes`."""
        self._plugins = list(plugins)
        self._unreadable = list(unreadable)
        self._limits = limits

    @property
    def records(self) -> list[PluginRecord]:
        """One entry per entry point, whatever became of it."""
        self._load_all()
        return [*(plugin.record for plugin in self._plugins), *self._unreadable]

    def listed(self, name: str) -> list[PluginRecord]:
        """The entries of this name as they are now: which package brings them is known without an import."""
        return [record for record in [*(p.record for p in self._plugins), *self._unreadable] if record.name == name]

    @property
    def modes(self) -> list[str]:
        """Names of the modes that can be used, sorted."""
        self._load_all()
        return sorted(plugin.name for plugin in self._plugins if plugin.group == GROUP and plugin.record.usable)

    def require(self, mode: str) -> None:
        """Raises UnknownModeError unless the mode can be used."""
        self._owner(mode)

    def implements(self, mode: str, hook: str) -> bool:
        """Whether a mode implements a hook."""
        return self._owner(mode).implements(hook)

    def named(self, name: str) -> list[Plugin]:
        """The plugins of this name, mode or not, that can be used."""
        return [plugin for plugin in self._plugins if plugin.name == name and self._settled(plugin)]

    def offering(self, hook: str) -> list[Plugin]:
        """Every plugin that implements a hook, by name."""
        self._load_all()
        return sorted((plugin for plugin in self._plugins if plugin.implements(hook)), key=lambda plugin: plugin.name)

    def fields(self, mode: str) -> tuple[str, ...]:
        """What the module of a mode's objective states as `LORA_RT_FIELDS`: known without a base; empty if nothing."""
        return self._owner(mode).fields

    def gates_of(self, mode: str) -> bool:
        """Whether a mode gates its adapters, each alone or all together."""
        return any(self.implements(mode, hook) for hook in UNTIMED)

    def acting_hooks(self, mode: str) -> list[str]:
        """The hooks by which a mode acts at inference: none is "static whatever the adapter"."""
        return [hook for hook in _ACTING if self.implements(mode, hook)]

    def why_not_static(self, mode: str, view: AdapterView) -> str:
        """Why an adapter of a mode that acts at inference has no constant weights, "" where it has."""
        told = self._owner(mode).ask("lora_rt_static", checked_static, context=private(view))
        if told is None:
            return f"acts at inference ({', '.join(self.acting_hooks(mode))}) and does not say that this one is static"
        return f"acts at inference: {told}" if told else ""

    def gate(self, mode: str, context: GateContext) -> Gate | None:
        """The checked gate of one adapter for one forward pass. Runs in the caller's thread, without a time limit."""
        return self.gates([(mode, context)])[0]

    def gates(self, asked: Sequence[tuple[str, GateContext]]) -> list[Gate | None]:
        """The checked gates of all gated adapters of one pass, (mode, context) each; a mode with a joint gate sees its
        adapters together."""
        found: list[Gate | None] = [None] * len(asked)
        for mode in dict.fromkeys(mode for mode, _ in asked):
            mine = [index for index, (owner, _) in enumerate(asked) if owner == mode]
            contexts = [asked[index][1] for index in mine]
            for index, gate in zip(mine, self._gates_of(self._owner(mode), contexts), strict=True):
                found[index] = gate
        self._check_finite(found, [mode for mode, _ in asked])
        return found

    def mixture_gates(self, mode: str, context: JointGateContext) -> list[Gate | None]:
        """The checked gates of the adapters of a named composition, as its mode decides; None is "always 1"."""
        assert context.composition is not None
        found = self._joint(self._owner(mode), context.adapters, context.composition)
        gates: list[Gate | None] = [None] * len(context.adapters) if found is None else list(found)
        self._check_finite(gates, [mode] * len(gates))
        return gates

    def mixture(self, mode: str, context: MixtureContext) -> Mixture:
        """The checked start of a fit of a composition of this mode.

        Raises:
            UnknownModeError: also where the mode mixes no adapters.
        """
        hook, owner = "lora_rt_mixture", self._owner(mode)
        found: Mixture | None = owner.ask(hook, partial(_tensors().checked_mixture, context=context), context=context)
        if found is None:
            text = f"the mode {mode!r} does not mix adapters"
            raise UnknownModeError(
                text, next_step=f"Use one of: {', '.join(plugin.name for plugin in self.offering(hook))}"
            )
        return found

    def _check_finite(self, gates: Sequence[Gate | None], modes: Sequence[str]) -> None:
        fault = _tensors().not_finite(gates)
        if fault is not None:
            owner = self._owner(modes[fault[0]])
            hook = "lora_rt_joint_gate" if owner.implements("lora_rt_joint_gate") else "lora_rt_gate"
            raise owner.broke(hook, f"{fault[1]} holds numbers that are not finite")

    def _gates_of(self, owner: Plugin, contexts: Sequence[GateContext]) -> list[Gate | None]:
        if (joint := self._joint(owner, contexts)) is not None:
            return joint
        return [
            owner.ask("lora_rt_gate", partial(_tensors().checked_gate, context=context), context=private(context))
            for context in contexts
        ]

    def _joint(
        self, owner: Plugin, contexts: Sequence[GateContext], composition: AdapterView | None = None
    ) -> list[Gate | None] | None:
        if not owner.implements("lora_rt_joint_gate"):
            return None
        mine = JointGateContext(
            [private(one) for one in contexts], None if composition is None else private(composition)
        )
        return owner.ask("lora_rt_joint_gate", lambda value: _tensors().checked_gates(value, contexts), context=mine)

    def scene(self, mode: str, context: SceneContext) -> ScenePrediction | None:
        """The checked scene types of the rows of a request, or None for none."""
        return self._owner(mode).ask(
            "lora_rt_scene", lambda value: _tensors().checked_prediction(value, context), context=private(context)
        )

    def weights(self, mode: str, context: ComposeContext) -> list[float] | None:
        """The checked weights of a mode's terms, or None for the user's own."""
        own = replace(context, terms=[private(term) for term in context.terms])
        return self._owner(mode).ask(_COMPOSE, lambda value: checked_weights(value, context), context=own)

    def deciding(self, modes: Iterable[str], action: Callable[[], T]) -> T:
        """Run an action that asks for the weights of many rows: all that these modes are asked is in one thread."""
        if shared_thread.get() is not None or not any(self.implements(mode, _COMPOSE) for mode in set(modes)):
            return action()
        calls: list[tuple[Plugin, str]] = []

        def sharing() -> T:
            shared_thread.set(calls)  # in this thread's own copy of the variables
            return action()

        outcome = within(self._limits[_COMPOSE], sharing)
        if outcome.late:
            if not calls:
                return action()  # no plugin was asked in all that time: each call has its own limit then
            plugin, hook = calls[-1]
            raise plugin.gave_up(hook)
        if outcome.error is not None:
            raise outcome.error
        found: T = outcome.value
        return found

    def objective(self, mode: str, context: ObjectiveContext) -> Objective | None:
        """The checked objective of a training run. Its methods raise PluginError from now on when they fail."""
        hook, owner = "lora_rt_objective", self._owner(mode)

        def blame(what: str, why: object) -> PluginError:
            return owner.broke(f"{hook}, {what}", why)

        return owner.ask(hook, lambda value: _tensors().checked_objective(value, context, blame), context=context)

    def sources(self) -> Sources:
        """(label, find) of every registry source that plugins add; no plugin is imported before they are looked at."""
        return Sources(partial(self.offering, "lora_rt_sources"))

    def call(self, mode: str, hook: str, **arguments: Any) -> Any:
        """The unchecked result of one hook of one mode, or None if the mode does not implement it."""
        return self._owner(mode).ask(hook, **arguments)

    def _owner(self, mode: str) -> Plugin:
        mine = [plugin for plugin in self._plugins if plugin.name == mode and plugin.group == GROUP]
        for plugin in mine:
            if self._settled(plugin):
                return plugin
        if mine:
            record = mine[0].record
            raise UnknownModeError(
                f"the mode {mode!r} of {record.origin} is {record.status}: {record.reason}",
                next_step="See: lora-rt plugins",
            )
        there = sorted({p.name for p in self._plugins if p.group == GROUP and p.record.usable})
        raise UnknownModeError(
            f"no plugin provides the mode {mode!r}; there are: {', '.join(there) or 'none'}",
            next_step="Install the package that brings it with: lora-rt install PACKAGE",
        )

    def _settled(self, plugin: Plugin) -> bool:
        """Whether a plugin can be used: of several that can and have one name, the first."""
        if plugin.record.status == "blocked":
            return False
        for other in self._plugins[: self._plugins.index(plugin)]:
            if (other.group, other.name) == (plugin.group, plugin.name) and other.load().usable:
                kind = "mode" if plugin.group == GROUP else "plugin"
                plugin.record.mark("broken", f"the {kind} name {plugin.name!r} is taken by {other.record.origin}")
                return False
        return plugin.load().usable

    def _load_all(self) -> None:
        each(self._plugins, self._settled)


def _tensors() -> Any:
    """The checks of what holds tensors, which import torch: asked for when a hook has given some."""
    from lora_rt.plugins.manager import tensors

    return tensors
