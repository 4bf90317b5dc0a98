"""The hook specifications. Every hook is prefixed `lora_rt_`, typed, and says when it fires.

Only the plugin that owns an adapter's mode is called for it. What is not a mode (an entry point of `lora_rt.plugins`
instead of `lora_rt.modes`) has the last two hooks alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import typer

    from lora_rt.plugins.contract.composing import ComposeContext, Mixture, MixtureContext
    from lora_rt.plugins.contract.facts import AdapterView, SceneContext, ScenePrediction
    from lora_rt.plugins.contract.gating import Gate, GateContext, JointGateContext
    from lora_rt.plugins.contract.objective import Objective, ObjectiveContext
    from lora_rt.plugins.contract.services import Services

LORA_RT_API = 1
"""The version of this contract. A plugin module states the one that it was written for under the same name."""

hookspec = pluggy.HookspecMarker("lora_rt")
hookimpl = pluggy.HookimplMarker("lora_rt")


@hookspec(firstresult=True)
def lora_rt_objective(context: ObjectiveContext) -> Objective | None:
    """Fires once at the start of `lora-rt train --mode M`: what this run optimises. None: the mode trains nothing.

    Runs in a thread of its own and is given up after 60 s; the objective's methods run in the training loop.
    """


@hookspec(firstresult=True)
def lora_rt_gate(context: GateContext) -> Gate | None:
    """Fires once per forward pass and active adapter: its gate, or None for "always 1".

    Runs in the request's own thread (under torch's inference mode) and without a time limit, since it is on the hot
    path; after 10 s the log and `lora-rt plugins` say that the request is waiting for it. It may be called from several
    threads at once.
    """


@hookspec(firstresult=True)
def lora_rt_joint_gate(context: JointGateContext) -> Sequence[Gate | None] | None:
    """Fires once per forward pass in place of `lora_rt_gate`, with all adapters of the mode that act in it.

    One gate per adapter in `context.adapters`; None for all of it leaves the pass to `lora_rt_gate`. Otherwise as
    there. Fires as well for a named composition of this mode, with `context.composition`: its gates then multiply those
    that the adapters have of themselves.
    """


@hookspec(firstresult=True)
def lora_rt_mixture(context: MixtureContext) -> Mixture | None:
    """Fires once at the start of `lora-rt tune --per token` (or scene): the state of a composition of this mode.

    What it gives is fitted by gradient through `lora_rt_joint_gate` (and `lora_rt_scene`), with base and adapters
    frozen. Runs in a thread of its own and is given up after 60 s.
    """


@hookspec(firstresult=True)
def lora_rt_scene(context: SceneContext) -> ScenePrediction | None:
    """Fires once per request with rows whose scene type the caller left open: the scene types of their prompts.

    What it returns is what `lora_rt_compose` and `lora_rt_gate` then see; None leaves the rows without a scene type. Of
    several adapters of a row, the first whose mode has this hook is asked. Runs in a thread of its own and is given up
    after 10 s.
    """


@hookspec(firstresult=True)
def lora_rt_compose(context: ComposeContext) -> Sequence[float] | None:
    """Fires once per row of a request, and per set of its waking texts: one weight per index in `context.mine`.

    None leaves the user's own; weights are finite. All of one request run in one thread, which is given up after 10 s;
    several requests may run at once.
    """


@hookspec(firstresult=True)
def lora_rt_static(context: AdapterView) -> str | None:
    """Fires when a composition is exported as constant weights: why this adapter has none, or "" where it has.

    "" says that its gate is always 1 and its weight the user's. A mode with a gate or with weights of its own that does
    not answer (None, or no such hook) counts as not static. Runs in a thread of its own and is given up after 10 s.
    """


@hookspec
def lora_rt_commands(app: typer.Typer, services: Services) -> None:
    """Fires when a command is not one of ours, and for `lora-rt --help`: add subcommands to `app`.

    `app` is this plugin's own and empty; `services` is what its commands need of lora-rt, and may be left out. A
    command that has the name of one of ours is left out. Given up after 5 s. Where a group of commands has the mode's
    name, `lora-rt compose` points to it when an adapter of the mode speaks.
    """


@hookspec
def lora_rt_sources(register: Callable[[str, Callable[[str, Any], Any]], None]) -> None:
    """Fires when a name is looked up that nothing else has, and when all are listed: call `register(label, find)`.

    `find(name, base)` gives the path of an adapter's folder, or None. It is called by position; `base` is the identity
    of the base in use (`id`, `revision`, `digest`), or None where no base is known yet. The hook and each `find` are
    given up after 10 s.
    """
