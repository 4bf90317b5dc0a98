"""Whatever is more than one number per row and adapter, as gates on the rank axis: phases of rows that share a pass,
weights that differ by layer, and named compositions whose mode gates their adapters.

The weight of an adapter at a token becomes part of its gate, and the weight that the engine sees is 1:

    share = weight_v + layers_v + sum over compositions m:  weight_m * gate_m       (layers, rows, tokens, ranks)
    gate  = sum over variants v:  mask_v * share_v * own gate_v

Head gates of a composition lie on another axis: what multiplies a head is the mean of theirs, weighted by the shares,
which are brought a little away from 0 where they cancel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add

import torch
from torch import Tensor

from lora_rt.core.requests.moded import ModedComposition
from lora_rt.core.requests.rows import Row
from lora_rt.core.requests.timeline import Variant
from lora_rt.plugins.contract import Gate

_NEARLY_NONE = 2.0**-20
Mixed = Sequence[tuple[ModedComposition, Mapping[str, Gate]]]
"""The gates that each named composition of a variant gives its adapters."""


def merged(
    names: Sequence[str],
    variants: Sequence[Variant],
    gates: Sequence[Mapping[str, Gate | None]],
    mixed: Sequence[Mixed],
    device: torch.device,
) -> tuple[list[dict[str, float]], dict[str, Gate]]:
    """The weights of each row, 1 or 0, and the gate of each adapter.

    `gates[v]` are those of the adapters' own modes in variant v, `mixed[v]` those of named compositions.
    """
    rows = len(variants[0].rows)
    weights: list[dict[str, float]] = [{} for _ in range(rows)]
    combined: dict[str, Gate] = {}
    for name in names:
        acting = [i for i in range(rows) if any(_acts(variant, i, name) for variant in variants)]
        for i in acting:
            weights[i][name] = 1.0
        if acting:
            shares = [_share(name, variant.rows, ours, device) for variant, ours in zip(variants, mixed, strict=True)]
            combined[name] = _gate(variants, shares, [own.get(name) for own in gates], device)
    return weights, combined


def _acts(variant: Variant, row: int, name: str) -> bool:
    here = variant.mask is None or bool(variant.mask[row].any())
    return here and variant.rows[row].uses(name)


def _gate(
    variants: Sequence[Variant], shares: Sequence[Gate], gates: Sequence[Gate | None], device: torch.device
) -> Gate:
    ranks: list[Tensor] = []
    heads: list[Tensor] = []
    headed = any(gate is not None and gate.heads is not None for gate in (*gates, *shares))
    for variant, share, gate in zip(variants, shares, gates, strict=True):
        # (1, 1, 1) or (rows, tokens, 1)
        where = torch.ones(1, 1, 1, device=device) if variant.mask is None else variant.mask[..., None].float()
        assert share.ranks is not None
        weight = share.ranks * where  # (layers|1, rows, tokens|1, ranks|1)
        ranks.append(weight if gate is None or gate.ranks is None else weight * gate.ranks)
        if headed:
            # of up to (layers, rows, tokens, heads)
            factors = where if share.heads is None else where * share.heads
            heads.append(factors if gate is None or gate.heads is None else factors * gate.heads)
    return Gate(ranks=reduce(add, ranks), heads=reduce(add, heads) if headed else None)


def _share(name: str, rows: Sequence[Row], mixed: Mixed, device: torch.device) -> Gate:
    """What multiplies an adapter before its own mode's gate does: ranks (layers|1, rows, tokens|1, ranks|1)."""
    static = _weight(name, rows, device)  # (layers|1, rows, 1, 1)
    parts: list[tuple[Tensor, Tensor | None]] = []
    parts += [(static, None)] if any(row.weights.get(name) or name in row.layers for row in rows) else []
    for moded, gates in mixed:
        if (gate := gates.get(name)) is not None:
            own = torch.tensor([row.moded.get(moded, {}).get(name, 0.0) for row in rows], device=device)
            weight = own[None, :, None, None]  # (1, rows, 1, 1)
            parts.append((weight if gate.ranks is None else weight * gate.ranks, gate.heads))
    if not parts:
        return Gate(ranks=static)
    total = reduce(add, (ranks for ranks, _ in parts))  # (layers|1, rows, tokens|1, ranks|1)
    if all(heads is None for _, heads in parts):
        return Gate(ranks=total)
    headed = reduce(add, (ranks if heads is None else ranks * heads for ranks, heads in parts))
    total = torch.where(total == 0, _NEARLY_NONE, total)  # shares that cancel leave what their heads differ by
    return Gate(ranks=total, heads=headed / total)


def _weight(name: str, rows: Sequence[Row], device: torch.device) -> Tensor:
    """(layers|1, rows, 1, 1)."""
    flat = torch.tensor([row.weights.get(name, 0.0) for row in rows], device=device)  # (rows,)
    profiles = [row.layers.get(name) for row in rows]
    depth = max((len(profile) for profile in profiles if profile), default=0)
    if not depth:
        return flat[None, :, None, None]  # (1, rows, 1, 1)
    table = torch.tensor([profile or (0.0,) * depth for profile in profiles], device=device)  # (rows, layers)
    return (table.T + flat)[:, :, None, None]  # (layers, rows, 1, 1)
