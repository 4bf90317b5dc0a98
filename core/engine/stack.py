"""The factors of a set of active adapters, stacked on the rank axis once and reused by every plan over that set.

A layer of width 576 whose q (576 out) and v (192 out) read one input, and so are one group. emotion has r = 8 on both,
logic r = 4 on q alone:

    rank            0 .. 7     8 .. 11    12 .. 19
    site            q          q          v
    owner, slot     0, 0..7    1, 0..3    0, 0..7       0 is emotion, 1 is logic

    a of the group  (20, 576)  one product with the input serves q and v:  hidden = A x, 20 numbers per token
    b of q          (576, 12)  reads ranks 0 .. 11 of it     spans (0, 8), (8, 12)
    b of v          (192, 8)   reads ranks 12 .. 19          spans (0, 8), (8, 8): logic has none here

`emotion:0.7 logic:0.3` then multiplies hidden by [0.7] * 8 + [0.3] * 4 + [0.7] * 8: the weight of each rank's owner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lora_rt.core.engine.layout import Layout
from lora_rt.core.engine.topology import Topology
from lora_rt.core.multiply.many import Ranks, are_ranks, ranks_of

_CONSTANT = -1


@dataclass(frozen=True, slots=True)
class Factors:
    """One adapter at one site: a (r, in), b (out, r) with the scaling folded in, bias (out,) likewise or None.

    Of fused experts a (experts, r, in) and b (experts, out, r).
    `magnitude` (out,) is DoRA's, as it stands in the file; once the layer is known it is in b and in `scale` (out,),
    by which the layer's own output is multiplied and added.
    """

    a: Tensor
    b: Tensor
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    scale: Tensor | None = None

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[-2]


@dataclass(frozen=True, eq=False)
class StackedSite:
    """One site: its ranks `start:stop` in its group's hidden, b (out, ranks), `spans[k]` of adapter k within them.

    `columns` is what b is made of: (out, r) each, of experts (experts, out, r). `scales` (out, ranks) is b for what
    multiplies the layer's own output, None where nothing does.
    """

    group: int
    start: int
    stop: int
    columns: tuple[Tensor, ...]
    spans: tuple[tuple[int, int], ...]
    scales: Tensor | None = None

    @cached_property
    def b(self) -> Tensor:
        """(out, ranks), laid out when it is first asked for; of one adapter its own memory."""
        with torch.inference_mode(False):  # a pass with gradients may be next
            return self.columns[0] if len(self.columns) == 1 else _beside(self.columns)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of b."""
        return (*self.columns[0].shape[:-1], self.stop - self.start)

    @property
    def dtype(self) -> torch.dtype:
        """That of b."""
        return self.columns[0].dtype


@dataclass(frozen=True, eq=False)
class StackedGroup:
    """Sites with one input share one product with a (R, in). `pattern` is the number of its `Pattern`.

    `rows` is what a is made of: (r, in) each, of experts (experts, r, in). `offset` (R,) is None but where an adapter
    has a bias or a scale: each is one more rank whose hidden value is 1. `layout` is the input's.
    """

    rows: tuple[Tensor, ...]
    pattern: int
    layer: int | None
    offset: Tensor | None
    layout: Layout | None

    @cached_property
    def a(self) -> Tensor:
        """(R, in), laid out when it is first asked for; of one adapter its own memory."""
        with torch.inference_mode(False):  # a pass with gradients may be next
            return self.rows[0] if len(self.rows) == 1 else _below(self.rows)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of a."""
        first = self.rows[0].shape
        return (*first[:-2], sum(row.shape[-2] for row in self.rows), first[-1])

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype, and on the device, of a."""
        return self.rows[0]


@dataclass(frozen=True, slots=True, eq=False)
class Pattern:
    """What the R ranks of a group are, both (R,): `owners` the adapter of each, `slots` its number there, -1 a bias."""

    owners: Tensor
    slots: Tensor


@dataclass(frozen=True, eq=False)
class Stack:
    """Everything that a plan over these adapters needs. `sites[i]` is None where none of them acts.

    `patterns` are the few different ones among the groups; `widest` is the largest rank of an adapter at a site.
    """

    sites: list[StackedSite | None]
    groups: dict[int, StackedGroup]
    patterns: list[Pattern]
    widest: int

    @cached_property
    def ranks(self) -> tuple[Mapping[int, Ranks], Mapping[int, Ranks]]:
        """A of every group and B of every site where their ranks lie; not of experts, nor what is no float32 on a CPU.

        All at once: small things that are made between the large ones of a pass keep it from using memory again.
        """
        sites = {n: [column.T for column in s.columns] for n, s in enumerate(self.sites) if s is not None}
        found = {number: group.rows for number, group in self.groups.items()}, sites
        a, b = ({key: ranks_of(parts) for key, parts in factors.items() if are_ranks(parts)} for factors in found)
        return a, b

    def tensors(self) -> list[Tensor]:
        """A of every group and B of every site."""
        found = [tensor for site in self.sites if site is not None for tensor in (site.b, site.scales)]
        return [*(group.a for group in self.groups.values()), *(tensor for tensor in found if tensor is not None)]

    @property
    def nbytes(self) -> int:
        """What all of these take, once they are laid out."""
        sites = [site for site in self.sites if site is not None]
        parts = [*(row for group in self.groups.values() for row in group.rows), *(c for s in sites for c in s.columns)]
        return sum(part.nbytes for part in [*parts, *(s.scales for s in sites if s.scales is not None)])


def _beside(columns: Sequence[Tensor]) -> Tensor:
    """(out, ranks), rank after rank in memory as in the columns; of experts (experts, out, ranks), as ever."""
    if columns[0].dim() == 3:
        return torch.cat(list(columns), dim=-1)
    return torch.cat([column.T for column in columns]).T


def _below(rows: Sequence[Tensor]) -> Tensor:
    """(ranks, in), feature after feature in memory: sixteen tokens are multiplied up to five times as fast by that as
    by one rank after the other (16 x 576 by 96 ranks: 23 us for 105). Of experts (experts, ranks, in), as ever.
    """
    if rows[0].dim() == 3:
        return torch.cat(list(rows), dim=-2)
    return torch.cat([row.T for row in rows], dim=1).T


def _placed(scales: Mapping[int, Tensor], ranks: int) -> Tensor | None:
    """(out, ranks) with each scale on its own rank."""
    if not scales:
        return None
    first = next(iter(scales.values()))
    placed = first.new_zeros(len(first), ranks)
    for rank, scale in scales.items():
        placed[:, rank] = scale
    return placed


def stack(topology: Topology, adapters: Sequence[Mapping[str, Factors]]) -> Stack:
    """Lay the adapters side by side at every site where at least one of them acts."""
    widest = max(factors.rank for adapter in adapters for factors in adapter.values())
    built = Stack([None] * len(topology.sites), {}, [], widest)
    known: dict[tuple[tuple[int, int], ...], int] = {}
    for group, indices in topology.groups_of(adapters).items():
        _stack_group(topology, adapters, group, indices, built, known)
    return built


def _stack_group(
    topology: Topology,
    adapters: Sequence[Mapping[str, Factors]],
    group: int,
    indices: list[int],
    built: Stack,
    known: dict[tuple[tuple[int, int], ...], int],
) -> None:
    rows: list[Tensor] = []
    ranks: list[tuple[int, int]] = []  # (adapter, slot) of each
    for index in indices:
        start, columns, spans = len(ranks), [], []
        scales: dict[int, Tensor] = {}
        for k, adapter in enumerate(adapters):
            first = len(ranks) - start
            if (factors := adapter.get(topology.sites[index].name)) is not None:
                rows.append(factors.a)  # (r, in)
                columns.append(factors.b)  # (out, r)
                ranks += [(k, slot) for slot in range(factors.rank)]
                if factors.bias is not None:  # one more rank: its hidden is 1 by the offset, its column the bias
                    rows.append(factors.a.new_zeros(1, factors.a.shape[1]))
                    columns.append(factors.bias[:, None])
                    ranks.append((k, _CONSTANT))
                if factors.scale is not None:  # another one, which multiplies the layer's own output (DoRA)
                    rows.append(factors.a.new_zeros(1, factors.a.shape[1]))
                    columns.append(factors.b.new_zeros(len(factors.b), 1))
                    scales[len(ranks) - start] = factors.scale
                    ranks.append((k, _CONSTANT))
            spans.append((first, len(ranks) - start))
        placed = _placed(scales, len(ranks) - start)
        built.sites[index] = StackedSite(group, start, len(ranks), tuple(columns), tuple(spans), placed)
    like = rows[0]
    # The blocks of a model are alike: their groups share one pattern, and gates are gathered once for all of them.
    pattern = known.setdefault(tuple(ranks), len(known))
    if pattern == len(built.patterns):
        owners, slots = torch.tensor(ranks, device=like.device).unbind(1)
        built.patterns.append(Pattern(owners, slots))
    fixed = [slot == _CONSTANT for _, slot in ranks]
    offset = torch.tensor(fixed, device=like.device).to(like.dtype) if any(fixed) else None
    site = topology.sites[indices[0]]
    built.groups[group] = StackedGroup(tuple(rows), pattern, site.layer, offset, site.layout)
