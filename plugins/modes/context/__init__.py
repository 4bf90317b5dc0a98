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
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    from torch import Tensor

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


def _untrained(context: ObjectiveContext, options: Options) -> Any:
    """Zeros throughout: gates and scales of exactly 1, and a classifier that finds every type equally likely."""
    from torch import nn, zeros

    state = nn.Module()
    for name, (shape, *narrow) in _shapes(len(context.scene_types), context.base).items():
        state.register_buffer(name, zeros(shape if options.heads or not narrow else narrow[0]))
    return state


def _shapes(types: int, base: BaseFacts, adapters: int = 0) -> dict[str, list[tuple[int, ...]]]:
    """The shapes that each tensor of the state may have: of an adapter, or of a composition of so many."""
    each = (adapters,) if adapters else ()
    return {
        "theta": [(*each, types, base.layers, base.heads), (*each, types, base.layers, 1)],
        "scale": [(*each, types)],
        "registrar": [(types + 1, base.hidden_size + 1)],
    }


def _read(name: str, of: AdapterView) -> Tensor | None:
    """A tensor of the state; None where the adapter has none, or knows no scene types.

    Raises:
        LoraRtError: it has another shape than scene types and base give it.
    """
    types = len(_types(of.card))
    tensor = of.state.get(name)
    if tensor is None or not types:
        return None
    allowed = _shapes(types, of.base, len(of.card.get("weights", ())))[name]
    if tuple(tensor.shape) not in allowed:
        raise LoraRtError(
            f"{name!r} in the state of {of.adapter!r} has the shape {tuple(tensor.shape)}, not {allowed[0]}",
            next_step="Fit it again with: lora-rt tune --per scene",
        )
    return tensor


@hookimpl
def lora_rt_objective(context: ObjectiveContext) -> Objective:
    """The adapter's own training run; its gates are fitted later, with the adapters frozen."""
    options = read_options(context.options, Options)
    if not context.scene_types or NEUTRAL in context.scene_types:
        raise LoraRtError(
            f"a context adapter needs the scene types that its gate is to tell apart, without {NEUTRAL!r}",
            next_step="Name them, for instance: --scene-types logic,emotion,body,archetype",
        )
    objective = SceneToText(context, _untrained(context, options))
    objective.hidden_layers = _depth(options, context.base)
    return objective


def _depth(options: Options, base: BaseFacts) -> int:
    """Stated, not left to the runtime's default: a fitted classifier is of use at its own depth alone."""
    check_depth(options.hidden_layers, base.layers)
    return options.hidden_layers or max(1, base.layers // 4)


@hookimpl
def lora_rt_mixture(context: MixtureContext) -> Mixture:
    """A composition whose registers lead by the scene type of the prompt."""
    from torch import zeros

    options = read_options(context.options, Options)
    types = len(context.scene_types)
    if not types:
        text = "no example of the data has a scene type by which a composition could be led"
        raise LoraRtError(text, next_step='Give each line one: {"scene": ..., "text": ..., "scene_type": ...}')
    shapes = _shapes(types, context.base, len(context.adapters))
    state = {name: zeros(allowed[0] if options.heads else allowed[-1]) for name, allowed in shapes.items()}
    return Mixture(state, hidden_layers=_depth(options, context.base))


@hookimpl
def lora_rt_joint_gate(context: JointGateContext) -> list[Gate | None] | None:
    """Of a composition: what each of its adapters says under the scene types of the rows; None for adapters alone."""
    import torch

    view = context.composition
    if view is None:
        return None
    acting = [any(active) for active in zip(*(one.active for one in context.adapters), strict=True)]
    kinds = [kind if acts else None for kind, acts in zip(context.adapters[0].scene_types, acting, strict=True)]
    theta, scale = _read("theta", view), _read("scale", view)
    if theta is None or scale is None or all(kind is None for kind in kinds):
        return [None] * len(context.adapters)
    device = context.adapters[0].input_ids.device
    theta, scale = theta.to(device), scale.to(device)
    shares = _shares(kinds, _types(view.card), view.adapter).to(theta)
    rest = shares[:, -1]
    # (rows, types) x (adapters, types, layers, heads) -> (adapters, layers, rows, heads)
    heads = torch.einsum("rt,ktlh->klrh", shares[:, :-1], 2 * theta.sigmoid()) + rest[:, None]
    ranks = torch.einsum("rt,kt->kr", shares[:, :-1], scale.exp()) + rest
    return [Gate(ranks=r[None, :, None, None], heads=h[:, :, None, :]) for r, h in zip(ranks, heads, strict=True)]


@hookimpl
def lora_rt_scene(context: SceneContext) -> ScenePrediction | None:
    """The softmax of a linear map of the prompt's mean early hidden state.

    Each token's state is brought to length 1 first: a few tokens of a prompt have states a thousand times the others'.
    """
    import torch

    classifier = _read("registrar", context)
    if classifier is None:
        return None
    directions = torch.nn.functional.normalize(context.hidden.float(), dim=-1)
    mask = context.mask[..., None].float()
    mean = (directions * mask).sum(1) / mask.sum(1).clamp(min=1)
    weights = classifier.to(mean)
    scores = mean @ weights[:, :-1].T + weights[:, -1]
    return ScenePrediction([*_types(context.card), NEUTRAL], scores.softmax(-1))


@hookimpl
def lora_rt_compose(context: ComposeContext) -> Sequence[float] | None:
    """The user's weight times the scale of the row's scene type; the user's own where no type is known."""
    if context.scene_type is None:
        return None
    return [_scaled(context.terms[i].weight, context, i) for i in context.mine]


def _scaled(weight: float, context: ComposeContext, index: int) -> Any:
    import torch

    view = context.view(index)
    scale = _read("scale", view)
    if scale is None or not (torch.is_grad_enabled() or bool(scale.any())):
        return weight
    shares = _shares([context.scene_type], _types(view.card), view.adapter).to(scale)[0]
    return weight * (shares[:-1] @ scale.exp() + shares[-1])


@hookimpl
def lora_rt_gate(context: GateContext) -> Gate | None:
    """The mixture of the gates of each row's scene types; "always 1" where nothing was trained or no type is known."""
    import torch

    theta = _read("theta", context)
    known = [kind if active else None for kind, active in zip(context.scene_types, context.active, strict=True)]
    if theta is None or all(kind is None for kind in known):
        return None
    if not torch.is_grad_enabled() and not bool(theta.any()):
        return None
    theta = theta.to(context.input_ids.device)
    shares = _shares(known, _types(context.card), context.adapter).to(theta)
    # (rows, types) x (types, layers, heads) -> (layers, rows, heads); what is not one of the types keeps a gate of 1.
    mixed = torch.einsum("rt,tlh->lrh", shares[:, :-1], 2 * theta.sigmoid()) + shares[:, -1, None]
    gate = mixed[:, :, None, :]
    return Gate(heads=gate) if gate.shape[-1] > 1 else Gate(ranks=gate)


@hookimpl
def lora_rt_static(context: AdapterView) -> str:
    """It is as long as nothing was fitted."""
    fitted = [name for name in ("theta", "scale") if (tensor := _read(name, context)) is not None and tensor.any()]
    return "its gate depends on the scene type" if fitted else ""


def _types(card: Mapping[str, Any]) -> list[str]:
    return list(card.get("scene_types", ()))


def _shares(kinds: Sequence[SceneType], types: Sequence[str], adapter: str) -> Tensor:
    """(rows, types + 1), each row adding up to 1; the last column is neutral's, as is a row without a type.

    Raises:
        LoraRtError: a type that the adapter does not know.
    """
    import torch

    names = [*types, NEUTRAL]
    rows = [_distribution(kind) for kind in kinds]
    strange = sorted({name for row in rows for name in row} - set(names))
    if strange:
        raise LoraRtError(
            f"the adapter {adapter!r} does not know the scene type {strange[0]!r}",
            next_step=f"Use one of: {', '.join(names)}",
        )
    return torch.tensor([[row.get(name, 0.0) for name in names] for row in rows])


def _distribution(kind: SceneType) -> Mapping[str, float]:
    if kind is None:
        return {NEUTRAL: 1.0}
    return {kind: 1.0} if isinstance(kind, str) else kind
