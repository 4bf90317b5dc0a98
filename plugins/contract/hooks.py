"""The hook specifications. Every hook is prefixed `lora_rt_`, typed, and says when it fires.

Only the plugin that owns an adapter's mode is called for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import typer

    from lora_rt.plugins.contract.composing import ComposeContext
    from lora_rt.plugins.contract.gating import Gate, GateContext
    from lora_rt.plugins.contract.objective import Objective, ObjectiveContext

LORA_RT_API = 1
"""The version of this contract. A plugin module states the one that it was written for under the same name."""

hookspec = pluggy.HookspecMarker("lora_rt")
hookimpl = pluggy.HookimplMarker("lora_rt")


@hookspec(firstresult=True)
def lora_rt_objective(context: ObjectiveContext) -> Objective | None:
    """Fires once at the start of `lora-rt train --mode M`: what this run optimises."""


@hookspec(firstresult=True)
def lora_rt_gate(context: GateContext) -> Gate | None:
    """Fires once per forward pass and active adapter: its gate, or None for "always 1"."""


@hookspec(firstresult=True)
def lora_rt_compose(context: ComposeContext) -> Sequence[float] | None:
    """Fires once per row of a request: one weight per index in `context.mine`, or None for the user's own."""


@hookspec
def lora_rt_commands(app: typer.Typer) -> None:
    """Fires when the command line starts and a command is not one of ours: add subcommands to `app`."""


@hookspec
def lora_rt_sources(register: Callable[[str, Callable[[str, Any], Any]], None]) -> None:
    """Fires when a name is resolved: `register(label, find)`, where `find(name, base)` gives the path of an adapter or None.

    `base` is the identity of the base in use (`id`, `revision`, `digest`), or None where no base is known yet.
    """
