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
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from torch import Tensor

LORA_RT_API = 1
GATES = ("softmax", "independent", "top1")
_MOST_RECENT = 200  # tokens
_FADED = 7  # times `recent`: tokens so far back count for a thousandth of the last one
_AT_ONCE = 256  # tokens of a pass whose means are made together
_FARTHEST = 6.0  # spreads from the mean; the state of a first token lies a hundred away


class RouterError(LoraRtError):
    """Weights that can't be routed, or a state that does not belong to the composition or to this base."""


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
    import torch

    options = read_options(context.options, Options)
    zero = [name for name, weight in zip(context.adapters, context.weights, strict=True) if weight == 0]
    if zero or len(context.adapters) < 2:
        text = f"{', '.join(zero)} has the weight 0" if zero else "one adapter leaves nothing to decide"
        raise RouterError(f"these adapters can't be routed: {text}", next_step="Name two or more, none with weight 0")
    layers = context.base.layers
    check_depth(options.hidden_layers, layers)
    if not 0 <= options.groups <= layers:
        text = f"groups is {options.groups}; this base has {layers} layers"
        raise RouterError(text, next_step=f"Give a number from 1 to {layers}, or 0 for every layer")
    groups, depth = options.groups or layers, options.hidden_layers
    features = _unit(context.hidden(depth))
    return Mixture(
        {
            "map": torch.zeros(groups, len(context.adapters), context.base.hidden_size + 1),
            "total": torch.zeros(groups),
            "mean": features.mean(0),
            "spread": features.std(0, correction=0).clamp(min=1e-6),
        },
        {"gate": options.gate, "recent": options.recent, **({"control": True} if options.control else {})},
        depth,
        shares=True,
    )


@hookimpl
def lora_rt_joint_gate(context: JointGateContext) -> Sequence[Gate | None] | None:
    """(layers, rows, tokens, 1) for each adapter of the composition."""
    import torch

    if context.composition is None:
        return None
    view, first = context.composition, context.adapters[0]
    recent, tokens = int(view.card.get("recent", 1)), first.input_ids.shape[1]
    hidden, mask = first.history() if recent > 1 else (first.hidden(), None)
    hidden = hidden[:, -tokens - _FADED * recent :]
    if view.card.get("control") and torch.is_grad_enabled():
        hidden = _of_other_tokens(hidden, first.input_ids, None if mask is None else mask[:, -hidden.shape[1] :])
    weights = torch.tensor([abs(weight) for weight in view.card["weights"]])
    state = _checked(view, len(weights))
    z = _scores(state, hidden)
    if mask is not None:
        z = _faded(z, mask[:, -hidden.shape[1] :], tokens, recent)
    z = z + state["map"].to(z)[:, None, None, :, -1]
    gates = _gates(str(view.card.get("gate")), z, weights.to(z), state["total"].to(z))
    owners = torch.arange(view.base.layers, device=z.device) * len(z) // view.base.layers
    spread = gates if len(z) == 1 else gates[owners]  # a gate of one group broadcasts over the layers
    return [Gate(ranks=spread[..., k, None]) for k in range(len(weights))]


@hookimpl
def lora_rt_static(context: AdapterView) -> str:
    """It is so only before it was fitted, and then it is not kept."""
    return "its weights are decided at every token"


def _scores(state: dict[str, Tensor], hidden: Tensor) -> Tensor:
    """What each token says by itself, (groups, rows, tokens, adapters)."""
    mean, spread = state["mean"].detach().to(hidden.device), state["spread"].detach().to(hidden.device)
    features = ((_unit(hidden) - mean) / spread).clamp(-_FARTHEST, _FARTHEST)
    weight = state["map"].to(features)
    # Along features of length about sqrt(hidden) a small step of the map is a small step of z.
    scale = weight.shape[-1] ** -0.5
    scores: Tensor = (features @ weight[:, None, :, :-1].mT) * scale
    return scores


def _of_other_tokens(hidden: Tensor, ids: Tensor, mask: Tensor | None) -> Tensor:
    """The same states (rows, tokens, hidden) in an order that tells neither row nor place, for a batch always the same.

    What stands at the same place of another row would still tell the place. Padding (mask 0) stays where it is.
    """
    import torch

    order = torch.Generator().manual_seed(int(ids.sum()))
    real = torch.ones(hidden.shape[:2], dtype=torch.bool) if mask is None else mask.bool().cpu()
    places = real.flatten().nonzero()[:, 0]
    taken = torch.arange(real.numel())
    taken[places] = places[torch.randperm(len(places), generator=order)]
    return hidden.flatten(0, 1)[taken.to(hidden.device)].view_as(hidden)


def _faded(z: Tensor, mask: Tensor, tokens: int, recent: int) -> Tensor:
    """The means over the row's last tokens, of the last `tokens` of z.

    Args:
        z: (groups, rows, all tokens, adapters).
        mask: (rows, all tokens), 0 on padding.
    """
    import torch

    z = z.masked_fill(~mask.bool()[..., None], 0.0)
    places = mask.long().cumsum(-1)
    parts = []
    for start in range(z.shape[2] - tokens, z.shape[2], _AT_ONCE):
        end = min(start + _AT_ONCE, z.shape[2])
        begin = max(0, start - _FADED * recent)
        back = places[:, start:end, None] - places[:, None, begin:end]  # (rows, of the pass, all that count)
        counts = (back >= 0) & (back < _FADED * recent) & mask[:, None, begin:end].bool()
        share = (1 - 1 / recent) ** back.clamp(min=0).to(z) * counts
        share = share / share.sum(-1, keepdim=True).clamp(min=torch.finfo(z.dtype).tiny)  # padding has no token
        parts.append(share @ z[:, :, begin:end])
    faded: Tensor = torch.cat(parts, 2) * float(recent) ** 0.5
    return faded


def _unit(hidden: Tensor) -> Tensor:
    """Each token's state brought to length 1: a few tokens have states a thousand times the others'."""
    import torch

    return torch.nn.functional.normalize(hidden.float(), dim=-1)


def _gates(kind: str, z: Tensor, weights: Tensor, total: Tensor) -> Tensor:
    """What multiplies each weight, in the shape of z; `weights` (adapters,) are all above 0."""
    import torch

    if kind == "independent":
        most = (2 * weights).clamp(min=1.0)
        return most / weights * (torch.logit(weights / most) + z).sigmoid()
    shares = (weights.log() + z).softmax(-1)
    if kind == "top1" and not torch.is_grad_enabled():
        shares = torch.zeros_like(shares).scatter_(-1, shares.argmax(-1, keepdim=True), 1.0)
    return shares * weights.sum() / weights * total.exp()[:, None, None, None]


def _checked(view: AdapterView, adapters: int) -> dict[str, Tensor]:
    """The tensors of the state.

    Raises:
        RouterError: they were fitted for another number of adapters, or a base of another size.
    """
    hidden = view.base.hidden_size
    state = {name: view.state[name] for name in ("map", "total", "mean", "spread") if name in view.state}
    groups = state["map"].shape[0] if "map" in state and state["map"].dim() == 3 else 0
    shapes = {"map": (groups, adapters, hidden + 1), "total": (groups,), "mean": (hidden,), "spread": (hidden,)}
    wrong = [name for name, shape in shapes.items() if name not in state or tuple(state[name].shape) != shape]
    if wrong or not 1 <= groups <= view.base.layers:
        found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in state.items()) or "nothing"
        raise RouterError(
            f"the state of {view.adapter!r} does not fit {adapters} adapters over a base of hidden size {hidden} and "
            f"{view.base.layers} layers: {found}",
            next_step="Fit it again with: lora-rt tune --per token",
        )
    return state
