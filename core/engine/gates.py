"""From the weights of a batch and the gates of its adapters to one multiplier per rank of every group of layers.

Gates arrive as `lora_rt.plugins.contract.Gate` describes them: missing leading axes are added, then the axes are
(layers, batch, tokens, rank or head), each of length 1 where a gate does not vary.

Two rows, `emotion:0.7 logic:0.3` and `logic:1`, over the group of `stack.py`'s example, without gates:

    weights (2, K)       [[0.7, 0.3], [0.0, 1.0]]
    owners  (R,)         0 x 8, 1 x 4, 0 x 8
    g (2, 1, R)          row 0: 0.7 x 8, 0.3 x 4, 0.7 x 8        row 1: 0.0 x 8, 1.0 x 4, 0.0 x 8

A gate of emotion that fades in over three tokens, (1, 1, 3, 1), makes that g (2, 3, R): emotion's ranks times its
value at each token, logic's as before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lora_rt.core.engine.stack import Stack
from lora_rt.plugins.contract import Gate


def rank_gates(stack: Stack, weights: Tensor, gates: Sequence[Gate | None]) -> dict[int, Tensor]:
    """Group -> weight times gate of each of its ranks, (batch|1, tokens|1, R), where the group lies.

    `weights` is (batch|1, K).
    """
    ranked = {k: four(g.ranks, weights) for k, g in enumerate(gates) if g is not None and g.ranks is not None}
    if not ranked:
        static = [weights[:, None, pattern.owners.to(weights.device)] for pattern in stack.patterns]
        return {number: static[group.pattern].to(group.like) for number, group in stack.groups.items()}
    columns = [_column(weights[None, :, k, None, None], ranked.get(k), stack.widest) for k in range(weights.shape[1])]
    # (layers|1, batch|1, tokens|1, K, 1 or widest + 1): adapter by adapter what each of its ranks is multiplied with
    combined = torch.stack(torch.broadcast_tensors(*columns), dim=3)  # type: ignore[no-untyped-call]
    gathered = []
    for pattern in stack.patterns:
        owners, slots = pattern.owners.to(combined.device), pattern.slots.to(combined.device)
        slots = slots.remainder(combined.shape[-1])  # a bias's slot, -1, is the last one
        gathered.append(combined[..., owners, slots])  # (layers|1, batch|1, tokens|1, R)
    return {
        number: layer_of(gathered[group.pattern], group.layer).to(group.like) for number, group in stack.groups.items()
    }


def _column(weight: Tensor, gate: Tensor | None, widest: int) -> Tensor:
    """Weight (1, batch|1, 1, 1) times the gate of one adapter: (layers|1, batch|1, tokens|1, 1 or widest + 1).

    The last slot is a bias's: it lies on no rank, and takes the mean of the ranks' gates.
    """
    if gate is None:
        return weight
    if gate.shape[-1] > 1:
        unused = gate.new_zeros(*gate.shape[:-1], widest - gate.shape[-1])
        gate = torch.cat([gate, unused, gate.mean(-1, keepdim=True)], dim=-1)
    return weight * gate


def head_gates(weights: Tensor, gates: Sequence[Gate | None]) -> Mapping[int, Tensor]:
    """Adapter -> its head gate (layers|1, batch|1, tokens|1, heads|1), for those that have one."""
    return {k: four(g.heads, weights) for k, g in enumerate(gates) if g is not None and g.heads is not None}


def four(gate: Tensor, like: Tensor) -> Tensor:
    """All four axes, on the device and in the dtype of the weights: a gate may come in any."""
    return gate.to(like).reshape((1,) * (4 - gate.dim()) + tuple(gate.shape))


def layer_of(gate: Tensor, layer: int | None) -> Tensor:
    """(layers|1, batch, tokens, n) -> (batch, tokens, n) of one layer; the mean over layers outside the blocks."""
    if gate.shape[0] == 1:
        return gate[0]
    return gate.mean(0) if layer is None else gate[layer]
