"""The factors of a set of active adapters, stacked on the rank axis once and then reused by every plan over that set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_rt.core.engine.topology import Topology


@dataclass(frozen=True, slots=True)
class Factors:
    """One adapter at one site: a (r, in), b (out, r) with the scaling folded in, bias (out,) likewise or None."""

    a: Tensor
    b: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class StackedSite:
    """One site: its ranks `start:stop` within its group's hidden, b (out, ranks), `spans[k]` of adapter k within them."""

    group: int
    start: int
    stop: int
    b: Tensor
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, eq=False)
class StackedGroup:
    """Sites with one input share one product with a (R, in). `pattern` tells which adapter owns each of the R ranks.

    `offset` (R,) is None but where an adapter has a bias: such a bias is one more rank whose hidden value is always 1.
    """

    a: Tensor
    pattern: int
    layer: int | None
    offset: Tensor | None


@dataclass(frozen=True, slots=True, eq=False)
class Stack:
    """Everything that a plan over these adapters needs. `sites[i]` is None where none of them acts.

    `patterns[p]` is (R,): the index of the owning adapter of each rank.
    """

    sites: list[StackedSite | None]
    groups: dict[int, StackedGroup]
    patterns: list[Tensor]


def stack(topology: Topology, adapters: Sequence[Mapping[str, Factors]]) -> Stack:
    """Lay the adapters side by side at every site where at least one of them acts."""
    members: dict[int, list[int]] = {}
    for index, site in enumerate(topology.sites):
        if any(site.name in adapter for adapter in adapters):
            members.setdefault(site.group, []).append(index)
    built = Stack([None] * len(topology.sites), {}, [])
    known: dict[tuple[int, ...], int] = {}
    for group, indices in members.items():
        _stack_group(topology, adapters, group, indices, built, known)
    return built


def _stack_group(
    topology: Topology,
    adapters: Sequence[Mapping[str, Factors]],
    group: int,
    indices: list[int],
    built: Stack,
    known: dict[tuple[int, ...], int],
) -> None:
    rows: list[Tensor] = []
    owners: list[int] = []
    constant: list[bool] = []
    for index in indices:
        site = topology.sites[index]
        start, columns, spans = len(owners), [], []
        for k, adapter in enumerate(adapters):
            first = len(owners) - start
            if (factors := adapter.get(site.name)) is not None:
                rows.append(factors.a)
                columns.append(factors.b)
                owners += [k] * factors.a.shape[0]
                constant += [False] * factors.a.shape[0]
                if factors.bias is not None:
                    rows.append(torch.zeros_like(factors.a[:1]))
                    columns.append(factors.bias[:, None])
                    owners.append(k)
                    constant.append(True)
            spans.append((first, len(owners) - start))
        b = columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)
        built.sites[index] = StackedSite(group, start, len(owners), b, tuple(spans))
    a = rows[0] if len(rows) == 1 else torch.cat(rows)
    pattern = known.setdefault(tuple(owners), len(known))
    if pattern == len(built.patterns):
        built.patterns.append(torch.tensor(owners, device=a.device))
    offset = torch.tensor(constant, device=a.device).to(a.dtype) if any(constant) else None
    built.groups[group] = StackedGroup(a, pattern, topology.sites[indices[0]].layer, offset)
