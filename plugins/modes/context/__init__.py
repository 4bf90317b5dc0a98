"""context: a filter inside attention: at which heads the adapter acts, and how much, depends on the scene type.

For every scene type t that the adapter knows, layer l and attention head h there is a factor

    gate[t, l, h] = 2 * sigmoid(theta[t, l, h])        0 is "suppressed", 1 "as weighted", 2 "amplified"

on the adapter's contribution to that head (`Gate.heads`). theta starts at 0, so an untrained gate is exactly 1 and the
composition static. Over several types with shares p the factor is the mixture sum_t p_t * gate[t]; text that belongs
to none of them is the type "neutral", whose gate is always 1. `scale[t]`, likewise 1 at the start, multiplies the
user's weight of the term: with it a mix whose weights suit neutral text can still let one register speak alone.

Where the caller names no scene type, a linear classifier on the base's early hidden state gives the shares, once per
request. State: "theta" (types, layers, heads), "scale" (types,) as logarithm, "registrar" (types + 1, hidden + 1).

A named composition may be of this mode, too, over adapters of any mode: it then has one classifier, and a gate and a
scale for each of its adapters ("theta" and "scale" have one more axis in front), and lets the register lead to which
the prompt belongs.

The hooks are here; `filter.py` computes what they say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_rt.plugins.contract import (
    AdapterView,
    BaseFacts,
    ComposeContext,
    Gate,
    GateContext,
    JointGateContext,
    LoraRtError,
    Mixture,
    MixtureContext,
    Objective,
    ObjectiveContext,
    SceneContext,
    ScenePrediction,
    SceneToText,
    SceneType,
    check_depth,
    hookimpl,
    read_options,
)

if TYPE_CHECKING:
    from lora_rt.plugins.modes.context.filter import Filter

LORA_RT_API = 1
LORA_RT_FIELDS = ("scene", "text")
NEUTRAL = "neutral"


@dataclass(frozen=True)
class Options:
    """`heads=no` gives one factor per layer instead of one per attention head.

    `hidden_layers`: after how many of the base's blocks the classifier reads their state; 0 is a quarter of them.
    """

    heads: bool = True
    hidden_layers: int = 0


@hookimpl
def lora_rt_objective(context: ObjectiveContext) -> Objective:
    """The adapter's own training run; its gates are fitted later, with the adapters frozen."""
    options = read_options(context.options, Options)
    if not context.scene_types or NEUTRAL in context.scene_types:
        raise LoraRtError(
            f"a context adapter needs the scene types that its gate is to tell apart, without {NEUTRAL!r}",
            next_step="Name them, for instance: --scene-types logic,emotion,body,archetype",
        )
    objective = SceneToText(context, _untrained(len(context.scene_types), context.base, options))
    objective.hidden_layers = _depth(options, context.base)
    return objective


@hookimpl
def lora_rt_mixture(context: MixtureContext) -> Mixture:
    """A composition whose registers lead by the scene type of the prompt."""
    options = read_options(context.options, Options)
    types = len(context.scene_types)
    if not types:
        text = "no example of the data has a scene type by which a composition could be led"
        raise LoraRtError(text, next_step='Give each line one: {"scene": ..., "text": ..., "scene_type": ...}')
    state = _untrained(types, context.base, options, len(context.adapters))
    return Mixture(dict(state.named_buffers()), hidden_layers=_depth(options, context.base))


@hookimpl
def lora_rt_gate(context: GateContext) -> Gate | None:
    """The mixture of the gates of each row's scene types; "always 1" where nothing was trained or no type is known."""
    known = _of_active(context.scene_types, context.active)
    found = _filter(context)
    return None if found is None or known is None else found.gate(known, context.input_ids.device)


@hookimpl
def lora_rt_joint_gate(context: JointGateContext) -> list[Gate | None] | None:
    """Of a composition: what each of its adapters says under the scene types of the rows; None for adapters alone."""
    if context.composition is None:
        return None
    first = context.adapters[0]
    known = _of_active(first.scene_types, [any(row) for row in zip(*(a.active for a in context.adapters), strict=True)])
    found = _filter(context.composition)
    gates = None if found is None or known is None else found.gates(known, first.input_ids.device)
    return [None] * len(context.adapters) if gates is None else gates


@hookimpl
def lora_rt_scene(context: SceneContext) -> ScenePrediction | None:
    """What the classifier says of the prompts; None where there is none."""
    found = _filter(context)
    return None if found is None else found.prediction(context.hidden, context.mask)


@hookimpl
def lora_rt_compose(context: ComposeContext) -> Sequence[float] | None:
    """The user's weight times the scale of the row's scene type; the user's own where no type is known."""
    if context.scene_type is None:
        return None
    return [_scaled(context.terms[i].weight, context.view(i), context.scene_type) for i in context.mine]


@hookimpl
def lora_rt_static(context: AdapterView) -> str:
    """It is as long as nothing was fitted."""
    found = _filter(context)
    return "its gate depends on the scene type" if found is not None and found.acts else ""


def _filter(view: AdapterView) -> Filter | None:
    """What computes with the state of an adapter or a composition; None where there is none, or no scene types."""
    types = view.card.get("scene_types", ())
    if not types or not view.state:
        return None
    from lora_rt.plugins.modes.context.filter import Filter

    return Filter(view, [*types, NEUTRAL])


def _untrained(types: int, base: BaseFacts, options: Options, adapters: int = 0) -> Any:
    """A torch module of zeros: gates and scales of exactly 1, a classifier that finds every type equally likely."""
    from lora_rt.plugins.modes.context.filter import untrained

    return untrained(types, base, adapters, heads=options.heads)


def _depth(options: Options, base: BaseFacts) -> int:
    """Stated, not left to the runtime's default: a fitted classifier is of use at its own depth alone."""
    check_depth(options.hidden_layers, base.layers)
    return options.hidden_layers or max(1, base.layers // 4)


def _of_active(kinds: Sequence[SceneType], active: Sequence[bool]) -> list[SceneType] | None:
    """The scene type of each row, None where it is not known or does not matter; None for no row that has one."""
    known = [kind if acts else None for kind, acts in zip(kinds, active, strict=True)]
    return None if all(kind is None for kind in known) else known


def _scaled(weight: float, view: AdapterView, kind: SceneType) -> Any:
    found = _filter(view)
    return weight if found is None else found.scaled(weight, kind)
