"""Phases of rows that share a pass, and weights that differ by layer, as gates on the rank axis.

The weight of an adapter at a token becomes part of its gate, and the weight that the engine sees is 1:

    gate = sum over variants v:  mask_v * (weight_v + layers_v) * ranks_v        (layers, rows, tokens, ranks)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lora_rt.core.requests.rows import Row
from lora_rt.core.requests.timeline import Variant
from lora_rt.plugins.contract import Gate


def merged(
    names: Sequence[str],
    variants: Sequence[Variant],
    gates: Sequence[Mapping[str, Gate | None]],
    device: torch.device,
) -> tuple[list[dict[str, float]], dict[str, Gate]]:
    """The weights of each row, 1 or 0, and the gate of each adapter; `gates[v]` are those of the modes in variant v."""
    rows = len(variants[0].rows)
    weights: list[dict[str, float]] = [{} for _ in range(rows)]
    combined: dict[str, Gate] = {}
    for name in names:
        acting = [i for i in range(rows) if any(_acts(variant, i, name) for variant in variants)]
        for i in acting:
            weights[i][name] = 1.0
        if acting:
            combined[name] = _gate(name, variants, [own.get(name) for own in gates], device)
    return weights, combined


def _acts(variant: Variant, row: int, name: str) -> bool:
    here = variant.mask is None or bool(variant.mask[row].any())
    return here and (variant.rows[row].weights.get(name, 0.0) != 0.0 or name in variant.rows[row].layers)


def _gate(name: str, variants: Sequence[Variant], gates: Sequence[Gate | None], device: torch.device) -> Gate:
    ranks: list[Tensor] = []
    heads: list[Tensor] = []
    headed = any(gate is not None and gate.heads is not None for gate in gates)
    for variant, gate in zip(variants, gates, strict=True):
        where = torch.ones(1, 1, 1, device=device) if variant.mask is None else variant.mask[..., None].float()
        weight = _weight(name, variant.rows, device) * where
        ranks.append(weight if gate is None or gate.ranks is None else weight * gate.ranks)
        if headed:
            heads.append(where if gate is None or gate.heads is None else where * gate.heads)
    return Gate(ranks=_sum(ranks), heads=_sum(heads) if headed else None)


def _sum(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def _weight(name: str, rows: Sequence[Row], device: torch.device) -> Tensor:
    """(layers|1, rows, 1, 1)."""
    flat = torch.tensor([row.weights.get(name, 0.0) for row in rows], device=device)
    profiles = [row.layers.get(name) for row in rows]
    depth = max((len(profile) for profile in profiles if profile), default=0)
    if not depth:
        return flat[None, :, None, None]
    table = torch.tensor([profile or (0.0,) * depth for profile in profiles], device=device)
    return (table.T + flat)[:, :, None, None]
