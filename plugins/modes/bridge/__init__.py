"""bridge: scene <-> text. One adapter that expands a scene into a text and compresses a text into its scene.

    objective.py   what it is trained on, and its options
    directions.py  the words by which a prompt says which direction is meant
    hyper.py       `lora_rt.HyperBridge`: compress, expand, score
    measure.py     what a bridge does on held-out pairs, beside controls: words.py; table.py shows it
    commands.py    `lora-rt bridge`, its items (items.py), and the data of cycle training (cycle.py)

The hooks, here, stand on the contract alone; the rest stands on the public face of `lora_rt`, as a stranger's would.

A share of the ranks can be reserved to each direction; the rest is shared. Then the gate is 0 on the other's ranks,
while training and afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_rt.plugins.contract import (
    AdapterView,
    Gate,
    GateContext,
    Objective,
    ObjectiveContext,
    Services,
    hookimpl,
    read_options,
)
from lora_rt.plugins.modes.bridge.directions import DIRECTIONS, RESERVE, direction_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    import typer

LORA_RT_API = 1
LORA_RT_FIELDS = ("scene", "text")


@hookimpl
def lora_rt_objective(context: ObjectiveContext) -> Objective:
    """The objective of one bridge."""
    from lora_rt.plugins.modes.bridge.objective import Both, Options, Weighted

    options = read_options(context.options, Options)
    return Both(context, options) if options.plain else Weighted(context, options)


@hookimpl
def lora_rt_gate(context: GateContext) -> Gate | None:
    """Where ranks are reserved: 0 on those of the direction that the row's prompt does not ask for."""
    if RESERVE not in context.state:
        return None
    from lora_rt.plugins.modes.bridge.objective import masks

    table = masks(float(context.state[RESERVE]), context.rank)  # (2, rank)
    prompts: Sequence[str | None] = context.prompts or [None] * len(context.active)
    rows = [DIRECTIONS.index(direction_of(prompt)) for prompt in prompts]
    return Gate(ranks=table[rows][:, None, :].to(context.input_ids.device))


@hookimpl
def lora_rt_static(context: AdapterView) -> str:
    """It is, unless ranks are reserved."""
    return "a share of its ranks belongs to one direction" if RESERVE in context.state else ""


@hookimpl
def lora_rt_commands(app: typer.Typer, services: Services) -> None:
    """`lora-rt bridge`: compress, expand, roundtrip, cycle, measure."""
    from lora_rt.plugins.modes.bridge.commands import group

    app.add_typer(group(services), name="bridge")
