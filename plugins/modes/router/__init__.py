"""router: a mixture of adapters that is decided anew at every token.

From the base's early hidden state h of a token, by default what the first block is given, brought to length 1 and
standardised by feature, a linear map gives one number z per adapter (and group of layers), which moves the
composition's own weights w:

    softmax        w'_k = total * |w|_1 * softmax_k(log |w_k| + z_k)          they share out the sum of the weights
    independent    w'_k = c_k * sigmoid(logit(|w_k| / c_k) + z_k)             each has its own; c_k = max(1, 2 |w_k|)
    top1           the softmax's first alone, with all of the sum             fitted soft, used hard

What h says of a token's register is scattered, and registers last for sentences: with `recent=N` above 1 (by default
8) z is the mean over the row's last tokens, each older one counting 1 - 1/N of the one behind it, times sqrt(N).

The gate is w'_k / |w_k|, so that signs, and a factor before the composition's name, stay the user's. z starts at 0 and
`total` at 1: the static composition. `groups=N` decides for N groups of layers apart, `groups=0` for every layer: with
the softmax that is LoRA-Flow's gate (Wang et al. 2024), except that it reads one early state and not each layer's own
input. `top1` is a hard choice per token, as MoLoRA makes.

State: "map" (groups, adapters, hidden + 1), "total" (groups,) as logarithm, "mean" and "spread" (hidden,).

The hooks are here; `gates.py` computes what they say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lora_rt.plugins.contract import (
    AdapterView,
    Gate,
    JointGateContext,
    LoraRtError,
    Mixture,
    MixtureContext,
    check_depth,
    hookimpl,
    read_options,
)

LORA_RT_API = 1
GATES = ("softmax", "independent", "top1")
_MOST_RECENT = 200  # tokens


@dataclass(frozen=True)
class Options:
    """`gate`: softmax, independent or top1. `groups`: of layers that are decided for apart; 0 is every layer.

    `hidden_layers`: after how many of the base's blocks the state is read; 0 is what the first one is given, for which
    none has to run without adapters first. `recent`: over about how many of the last tokens what the states say is
    averaged; 1 is the token alone. `control`: fitted on the states of other tokens of its batch, to see what is found
    where there is nothing to find.
    """

    gate: str = "softmax"
    groups: int = 1
    hidden_layers: int = 0
    recent: int = 8
    control: bool = False

    def __post_init__(self) -> None:
        if self.gate not in GATES:
            raise ValueError(f"gate is {self.gate!r}, not one of: {', '.join(GATES)}")
        if not 1 <= self.recent <= _MOST_RECENT:
            raise ValueError(f"recent is {self.recent}; it must be from 1 to {_MOST_RECENT}")


@hookimpl
def lora_rt_mixture(context: MixtureContext) -> Mixture:
    """The static composition, and mean and spread of each feature on the data."""
    options = read_options(context.options, Options)
    zero = [name for name, weight in zip(context.adapters, context.weights, strict=True) if weight == 0]
    if zero or len(context.adapters) < 2:
        text = f"{', '.join(zero)} has the weight 0" if zero else "one adapter leaves nothing to decide"
        raise LoraRtError(f"these adapters can't be routed: {text}", next_step="Name two or more, none with weight 0")
    layers = context.base.layers
    check_depth(options.hidden_layers, layers)
    if not 0 <= options.groups <= layers:
        text = f"groups is {options.groups}; this base has {layers} layers"
        raise LoraRtError(text, next_step=f"Give a number from 1 to {layers}, or 0 for every layer")
    from lora_rt.plugins.modes.router.gates import start

    state = start(context, options.groups or layers, options.hidden_layers)
    card = {"gate": options.gate, "recent": options.recent, **({"control": True} if options.control else {})}
    return Mixture(state, card, options.hidden_layers, shares=True)


@hookimpl
def lora_rt_joint_gate(context: JointGateContext) -> Sequence[Gate | None] | None:
    """(layers, rows, tokens, 1) for each adapter of the composition."""
    if context.composition is None:
        return None
    from lora_rt.plugins.modes.router.gates import gates

    return gates(context.composition, context.adapters[0])


@hookimpl
def lora_rt_static(context: AdapterView) -> str:
    """It is so only before it was fitted, and then it is not kept."""
    return "its weights are decided at every token"
