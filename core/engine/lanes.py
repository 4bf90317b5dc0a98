"""The plan whose rows have a lane each: a row passes through its own adapters alone, gathered once for the batch.

    hidden = g * (A x^T)      A: (rows, R, in)    g: (rows, R, 1)    R: the most ranks that a row uses
    y     += hidden^T B       B: (rows, R, out)

With sixteen rows of two adapters each, all different, a shared stack would multiply every row with all thirty-two.
The weights are an argument of the gathered factors: they can change without gathering anew. (Punica's BGMV.)

A batch of two rows over a layer of width 576, emotion with r = 8, logic with r = 4 and body with r = 8:

    lane of row 0   emotion 0 .. 7, nothing 8 .. 11         R = 12, what the longer lane takes
    lane of row 1   logic 0 .. 3, body 4 .. 11              a (2, 12, 576)    b (2, 12, out)

Where a lane has nothing, a and b are zeros and the owner is number K, whose weight is 0.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import finalize

import numpy as np
import torch
from torch import Tensor

from lora_rt.core.engine import tiled_factors
from lora_rt.core.engine.few_rows import SiteFactors
from lora_rt.core.engine.layout import Layout, as_before, is_usual, rows_first
from lora_rt.core.engine.pieces import OwnFactors, Pieces
from lora_rt.core.engine.plan import Pass, Plan
from lora_rt.core.engine.resident import ResidentAdapter
from lora_rt.core.engine.stack import Factors
from lora_rt.core.engine.tiled_lanes import TiledLanes
from lora_rt.core.engine.topology import Topology
from lora_rt.core.multiply.many import Added

Membership = tuple[tuple[int, ...], ...]
"""Per row, the numbers of its adapters."""

_WIDE = 1024  # ranks
_SPARE = 256 * 2**20  # bytes that may lie idle


@dataclass(frozen=True, slots=True, eq=False)
class LaneSite:
    """One site: the ranks `start:stop` of its group's hidden, b (rows, ranks, out)."""

    group: int
    start: int
    stop: int
    b: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class LaneGroup:
    """Sites with one input: a (rows, R, in), and `owners` (rows, R), the adapter of each rank; K where there is none.

    `offset` (rows, R, 1) is 1 on the ranks that carry a bias; None where there is no bias. `layout` is the input's.
    """

    a: Tensor
    owners: Tensor
    offset: Tensor | None
    layout: Layout | None


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Lanes:
    """The factors of a batch, row by row."""

    sites: list[LaneSite | None]
    groups: dict[int, LaneGroup]

    def tensors(self) -> list[Tensor]:
        """A of every group and B of every site."""
        return [*(group.a for group in self.groups.values()), *(site.b for site in self.sites if site is not None)]


def pay_off(ranks: Sequence[int], rows: Membership, device: str = "cpu") -> bool:
    """Whether lanes are cheaper than a shared stack: their factors are read once a row, a stack's once a batch.

    On two cores a product with a shared stack takes 0.03 ns per row and number in it, and reading a number of a lane
    takes 0.12 ns; so a row has to use less than a quarter of the ranks that the batch uses. A GPU waits for memory and
    hardly for products: there the stack has to be as wide as a layer before lanes, of which each is a copy, win.
    """
    longest = max(sum(ranks[k] for k in row) for row in rows)
    return 4 * longest < sum(ranks) and (device == "cpu" or sum(ranks) > _WIDE)


class Spare:
    """The memory of lanes that nobody uses any more, for the next ones of the same sizes.

    On a CPU, pages that a process has are written in a fifth of the time that new ones take. Of a GPU's memory torch
    keeps its own.
    """

    def __init__(self) -> None:
        self._pieces: dict[tuple[int, torch.dtype], list[Tensor]] = {}

    def take(self, numbers: int, like: Tensor) -> Tensor:
        """So many numbers, of the dtype and on the device of a tensor; what stands in them is anything."""
        if like.is_cpu and (pieces := self._pieces.get((numbers, like.dtype))):
            with suppress(IndexError):  # another thread has taken the last one
                return pieces.pop()
        with torch.inference_mode(False):  # a tensor that can be written to in any mode
            return torch.empty(numbers, dtype=like.dtype, device=like.device)

    def kept_of(self, lanes: Lanes, pieces: Sequence[Tensor]) -> None:
        """When these lanes are gone, their pieces are to be had again, and what was spare before is given up."""
        if all(piece.is_cpu for piece in pieces) and sum(piece.nbytes for piece in pieces) <= _SPARE:
            finalize(lanes, self._keep, pieces).atexit = False

    def _keep(self, pieces: Sequence[Tensor]) -> None:
        kept: dict[tuple[int, torch.dtype], list[Tensor]] = {}
        for piece in pieces:
            kept.setdefault((piece.numel(), piece.dtype), []).append(piece)
        self._pieces = kept


@dataclass(frozen=True, slots=True)
class _Pattern:
    """How rows lie in a group: the `widths` of its sites' lanes, and the ranks `missing` in each row at each site."""

    widths: list[int]
    missing: list[list[int]]
    owners: Tensor
    offset: Tensor | None


_Found = Sequence[Sequence[Factors | None]]
"""Per site of a group the factors of each adapter."""


def gather(
    topology: Topology, adapters: Sequence[Mapping[str, Factors]], rows: Membership, spare: Spare | None = None
) -> Lanes:
    """Lay the adapters of each row on its lane, at every site where at least one of them acts.

    Args:
        topology: of the model.
        adapters: those that the rows use.
        rows: the adapters of each.
        spare: where memory comes from, and where it goes when nobody uses the lanes any more.
    """
    lanes = Lanes([None] * len(topology.sites), {})
    spare = spare or Spare()
    taken: list[Tensor] = []
    known: dict[Hashable, _Pattern] = {}  # the blocks of a model are alike, and few patterns differ
    for group, indices in topology.groups_of(adapters).items():
        sites = [topology.sites[index] for index in indices]
        found: _Found = [[adapter.get(site.name) for adapter in adapters] for site in sites]
        like = next(factors.a for of_site in found for factors in of_site if factors is not None)
        kinds = [None if f is None else (f.a.shape[0], f.bias is None) for of_site in found for f in of_site]
        key = like.device, like.dtype, len(sites), *kinds
        if (pattern := known.get(key)) is None:
            pattern = known[key] = _pattern(found, rows, like)

        def laid(pieces: list[Tensor], ranks: int, width: int, like: Tensor = like) -> Tensor:
            taken.append(spare.take(len(rows) * ranks * width, like))
            return torch.cat(pieces, out=taken[-1].view(-1, width)).view(len(rows), ranks, width)

        a, b = _pieces(found, rows, pattern, [like.shape[1], *(site.out_features for site in sites)])
        whole = laid(a, sum(pattern.widths), like.shape[1])
        lanes.groups[group] = LaneGroup(whole, pattern.owners, pattern.offset, sites[0].layout)
        start = 0
        for index, site, width, columns in zip(indices, sites, pattern.widths, b, strict=True):
            lanes.sites[index] = LaneSite(group, start, start + width, laid(columns, width, site.out_features))
            start += width
    spare.kept_of(lanes, taken)
    return lanes


def _pattern(found: _Found, rows: Membership, like: Tensor) -> _Pattern:
    """The pattern of a group whose sites have these factors."""
    nobody = len(found[0])
    sizes = [[0 if factors is None else _ranks(factors) for factors in of_site] for of_site in found]
    widths = [max(sum(of_site[k] for k in row) for row in rows) for of_site in sizes]
    missing = [
        [width - sum(of_site[k] for k in row) for of_site, width in zip(sizes, widths, strict=True)] for row in rows
    ]
    owners: list[int] = []
    constant: list[bool] = []
    for row, lacks in zip(rows, missing, strict=True):
        for of_site, lack in zip(found, lacks, strict=True):
            for k in row:
                if (factors := of_site[k]) is not None:
                    owners += [k] * _ranks(factors)
                    constant += [False] * factors.rank + [True] * (factors.bias is not None)
            owners += [nobody] * lack
            constant += [False] * lack
    shape = len(rows), sum(widths)
    offset = torch.tensor(constant).view(*shape, 1).to(like) if any(constant) else None
    return _Pattern(widths, missing, torch.tensor(owners).view(shape).to(like.device), offset)


def _pieces(
    found: _Found, rows: Membership, pattern: _Pattern, features: Sequence[int]
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """What stands on the lanes of all rows, one after the other: A's of the group, and B's of each site.

    Args:
        features: of the input, and of each site's output.
    """
    like = next(factors.a for of_site in found for factors in of_site if factors is not None)
    padding = like.new_zeros(max(1, *map(max, pattern.missing)), max(features))  # a bias is a rank whose A is zeros
    given, *outs = features
    turned = [[None if factors is None else factors.b.T for factors in of_site] for of_site in found]
    a: list[Tensor] = []
    b: list[list[Tensor]] = [[] for _ in found]
    for row, lacks in zip(rows, pattern.missing, strict=True):
        for of_site, columns, out, lack, own in zip(found, turned, outs, lacks, b, strict=True):
            for k in row:
                factors, column = of_site[k], columns[k]
                if factors is None or column is None:
                    continue
                a.append(factors.a)
                own.append(column)
                if factors.bias is not None:
                    a.append(padding[:1, :given])
                    own.append(factors.bias[None])
            if lack:
                a.append(padding[:lack, :given])
                own.append(padding[:lack, :out])
    return a, b


def _ranks(factors: Factors) -> int:
    """How many ranks factors take on a lane; a bias takes one."""
    return factors.rank + (factors.bias is not None)


class LaneFactors:
    """What lanes add to a step of one token a row on a CPU: each row's adapters where they lie, nothing is gathered."""

    def __init__(self, topology: Topology, active: Sequence[ResidentAdapter], own: OwnFactors, weights: Tensor) -> None:
        self._active, self._own, self._weights = active, own, weights
        acting = {topology.by_name[name] for adapter in active for name in adapter.factors}
        self._nothing = [index not in acting for index in range(len(topology.sites))]

    def is_nothing(self, index: int) -> bool:
        """As of `few_rows.AddedToSteps`."""
        return self._nothing[index]

    def pieces(self, indices: Sequence[int], rows: int) -> Pieces | None:
        """As of `few_rows.AddedToSteps`."""
        if rows != len(self._weights):
            return None
        members: list[tuple[int, int]] = self._weights.nonzero().tolist()
        widest = max(adapter.rank for adapter in self._active)
        gates = self._weights[self._weights != 0].float()[:, None].expand(-1, widest).contiguous()
        places = gates.data_ptr() + gates.itemsize * widest * np.arange(len(members), dtype=np.int64)
        return self._own.pieces(
            self._active, members, indices, (np.repeat(places[:, None], len(indices), axis=1), gates)
        )

    def factors(self, _index: int) -> SiteFactors | None:
        """As of `few_rows.AddedToSteps`: there are none that rows share."""
        return None


class LanePlan(Plan):
    """The weights (rows, K) of a batch whose rows have a lane each."""

    def __init__(
        self,
        topology: Topology,
        active: Sequence[ResidentAdapter],
        weights: Tensor,
        own: OwnFactors,
        gathered: Callable[[], Lanes],
    ) -> None:
        """
        Args:
            active: the adapters. own: where steps find their factors.
            gathered: gives the lanes, for passes of several tokens a row whose factors tiles don't read.
        """
        self.topology = topology
        self._active, self._weights, self._own = active, weights, own
        self._gathered = gathered

    @cached_property
    def lanes(self) -> Lanes:
        """Gathered when they are first asked for."""
        return self._gathered()

    @cached_property
    def gates(self) -> Mapping[int, Tensor]:
        """Group -> the weight of each rank, (rows, R, 1)."""
        weights, groups = self._weights, self.lanes.groups
        with torch.inference_mode(False):  # a pass with gradients may be next
            padded = torch.cat([weights, weights.new_zeros(len(weights), 1)], dim=1)
            return {number: padded.to(group.a).gather(1, group.owners)[:, :, None] for number, group in groups.items()}

    @cached_property
    def tiles(self) -> TiledLanes:
        """The factors as passes over many tokens read them by AMX."""
        return TiledLanes(self.topology, self._active, self._own, self._weights)

    @cached_property
    def few_rows(self) -> LaneFactors:
        """What it adds to the products of a step on a CPU."""
        return LaneFactors(self.topology, self._active, self._own, self._weights)

    def begin(self, rows: int, tokens: int, kept: int | Tensor | None) -> Pass:
        """A pass of a batch (rows, tokens)."""
        return LanePass(self, rows, tokens)

    def tensors(self) -> list[Tensor]:
        """The gathered factors and the gates."""
        return [*self.lanes.tensors(), *self.gates.values()]


class LanePass(Pass):
    """One forward pass. Remembers the last group's hidden, since q, k and v (gate and up) follow on one another."""

    def __init__(self, plan: LanePlan, rows: int, tokens: int) -> None:
        self.topology = plan.topology
        self._plan = plan
        self._rows = rows
        self._tokens = tokens
        self._group = -1
        self._input: Tensor | None = None
        self._hidden: Tensor | None = None
        self._halves: tuple[Tensor, int, Tensor] | None = None  # x, the group, and its hidden as a product adds it

    def few(self, _kernels: Any) -> LaneFactors:
        """What is added to the products of a step on a CPU."""
        return self._plan.few_rows

    def acts(self, index: int) -> bool:
        """Whether a row has an adapter at this site."""
        return not self._plan.few_rows.is_nothing(index)

    def added(self, index: int, x: Tensor) -> Added | None:
        """What the layer's product is to add to what it makes of rows of many tokens, read where residents keep it."""
        if not tiled_factors.reads(x, self._rows) or x.dim() != 3 or len(x) != self._rows:
            return None
        number = self.topology.sites[index].group
        group = self._plan.tiles.groups.get(number)
        if group is None or index not in group.sites:
            return None
        if self._halves is None or self._halves[0] is not x or self._halves[1] != number:
            gates = group.gates.repeat_interleave(x.shape[1], dim=0)
            self._halves = x, number, tiled_factors.halves_of(x, group.a, gates)
        return Added(self._halves[2], *group.sites[index])

    def add(self, index: int, x: Tensor, y: Tensor) -> Tensor:
        """y plus the contribution of each row's adapters to x."""
        site = self._plan.lanes.sites[index] if self.acts(index) else None
        if site is None:
            return y
        if self._hidden is None or self._input is not x or self._group != site.group:
            self._hidden = self._gated(site.group, x)
            self._input, self._group = x, site.group
        hidden = self._hidden[:, site.start : site.stop].transpose(1, 2)
        layout = self._plan.lanes.groups[site.group].layout
        if y.dtype == site.b.dtype and is_usual(layout, x) and not y.requires_grad:
            return y.baddbmm_(hidden, site.b)
        return y.add_(as_before(torch.bmm(hidden, site.b), layout, x, self._rows, self._tokens))

    def _gated(self, number: int, x: Tensor) -> Tensor:
        """g * (A x^T), (rows, R, tokens)."""
        group = self._plan.lanes.groups[number]
        by_row = rows_first(self.widened(x, group.a), group.layout, self._rows, self._tokens)
        hidden = torch.bmm(group.a, by_row.transpose(1, 2))
        if group.offset is not None:
            hidden += group.offset
        return hidden * self._plan.gates[number]
