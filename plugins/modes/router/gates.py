"""What the router computes: z of every token, and the gates that z gives."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_rt.plugins.contract import AdapterView, Gate, GateContext, LoraRtError, MixtureContext

_FADED = 7  # times `recent`: tokens so far back count for a thousandth of the last one
_AT_ONCE = 256  # tokens of a pass whose means are made together
_FARTHEST = 6.0  # spreads from the mean; the state of a first token lies a hundred away


def start(context: MixtureContext, groups: int, depth: int) -> dict[str, Tensor]:
    """The state of the static composition, for so many groups of layers."""
    features = _unit(context.hidden(depth))
    return {
        "map": torch.zeros(groups, len(context.adapters), context.base.hidden_size + 1),
        "total": torch.zeros(groups),
        "mean": features.mean(0),
        "spread": features.std(0, correction=0).clamp(min=1e-6),
    }


def gates(view: AdapterView, context: GateContext) -> list[Gate | None]:
    """The gate of each adapter of a composition; any one's context tells what all of them see.

    Raises:
        LoraRtError: the state belongs to another composition or base.
    """
    recent, tokens = int(view.card.get("recent", 1)), context.input_ids.shape[1]
    hidden, mask = context.history() if recent > 1 else (context.hidden(), None)
    hidden = hidden[:, -tokens - _FADED * recent :]
    if view.card.get("control") and torch.is_grad_enabled():
        hidden = _of_other_tokens(hidden, context.input_ids, None if mask is None else mask[:, -hidden.shape[1] :])
    weights = torch.tensor([abs(weight) for weight in view.card["weights"]])
    state = _checked(view, len(weights))
    z = _scores(state, hidden)
    if mask is not None:
        z = _faded(z, mask[:, -hidden.shape[1] :], tokens, recent)
    z = z + state["map"].to(z)[:, None, None, :, -1]
    shares = _shares(str(view.card.get("gate")), z, weights.to(z), state["total"].to(z))
    owners = torch.arange(view.base.layers, device=z.device) * len(z) // view.base.layers
    spread = shares if len(z) == 1 else shares[owners]  # a gate of one group broadcasts over the layers
    return [Gate(ranks=spread[..., k, None]) for k in range(len(weights))]


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
    return torch.nn.functional.normalize(hidden.float(), dim=-1)


def _shares(kind: str, z: Tensor, weights: Tensor, total: Tensor) -> Tensor:
    """What multiplies each weight, in the shape of z; `weights` (adapters,) are all above 0."""
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
        LoraRtError: they were fitted for another number of adapters, or a base of another size.
    """
    hidden = view.base.hidden_size
    state = {name: view.state[name] for name in ("map", "total", "mean", "spread") if name in view.state}
    groups = state["map"].shape[0] if "map" in state and state["map"].dim() == 3 else 0
    shapes = {"map": (groups, adapters, hidden + 1), "total": (groups,), "mean": (hidden,), "spread": (hidden,)}
    wrong = [name for name, shape in shapes.items() if name not in state or tuple(state[name].shape) != shape]
    if wrong or not 1 <= groups <= view.base.layers:
        found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in state.items()) or "nothing"
        raise LoraRtError(
            f"the state of {view.adapter!r} does not fit {adapters} adapters over a base of hidden size {hidden} and "
            f"{view.base.layers} layers: {found}",
            next_step="Fit it again with: lora-rt tune --per token",
        )
    return state
