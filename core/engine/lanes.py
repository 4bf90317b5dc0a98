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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lora_rt.core.engine.layout import Layout, as_before, is_usual, rows_first
from lora_rt.core.engine.plan import Pass, Plan
from lora_rt.core.engine.stack import Factors
from lora_rt.core.engine.topology import Topology

Membership = tuple[tuple[int, ...], ...]
"""Per row, the numbers of its adapters."""

_WIDE = 1024  # ranks


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


@dataclass(frozen=True, slots=True, eq=False)
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


def gather(topology: Topology, adapters: Sequence[Mapping[str, Factors]], rows: Membership) -> Lanes:
    """Lay the adapters of each row on its lane, at every site where at least one of them acts."""
    lanes = Lanes([None] * len(topology.sites), {})
    for group, indices in topology.groups_of(adapters).items():
        _gather_group(topology, adapters, rows, group, indices, lanes)
    return lanes


def _gather_group(
    topology: Topology,
    adapters: Sequence[Mapping[str, Factors]],
    rows: Membership,
    group: int,
    indices: list[int],
    lanes: Lanes,
) -> None:
    sites = [topology.sites[index] for index in indices]
    like = next(adapter[site.name].a for site in sites for adapter in adapters if site.name in adapter)
    acting = [
        [[(k, adapters[k][site.name]) for k in row if site.name in adapters[k]] for site in sites] for row in rows
    ]
    widths = [max(sum(_ranks(f) for _, f in row[n]) for row in acting) for n in range(len(sites))]
    padding = like.new_zeros(max(widths), max(like.shape[1], *(site.out_features for site in sites)))
    a: list[Tensor] = []  # of all rows, one after the other
    b: list[list[Tensor]] = [[] for _ in sites]
    owners: list[int] = []
    constant: list[bool] = []
    for row in acting:
        for number, (site, width) in enumerate(zip(sites, widths, strict=True)):
            missing = width
            for k, factors in row[number]:
                a.append(factors.a)
                b[number].append(factors.b.T)
                if factors.bias is not None:
                    a.append(padding[:1, : like.shape[1]])
                    b[number].append(factors.bias[None])
                owners += [k] * _ranks(factors)
                constant += [rank == factors.rank for rank in range(_ranks(factors))]
                missing -= _ranks(factors)
            a.append(padding[:missing, : like.shape[1]])
            b[number].append(padding[:missing, : site.out_features])
            owners += [len(adapters)] * missing
            constant += [False] * missing
    shape = len(rows), sum(widths)
    offset = torch.tensor(constant).view(*shape, 1).to(like) if any(constant) else None
    whole = torch.cat(a).view(*shape, like.shape[1])
    lanes.groups[group] = LaneGroup(whole, torch.tensor(owners).view(shape).to(like.device), offset, sites[0].layout)
    start = 0
    for index, width, pieces in zip(indices, widths, b, strict=True):
        lanes.sites[index] = LaneSite(group, start, start + width, torch.cat(pieces).view(len(rows), width, -1))
        start += width


def _ranks(factors: Factors) -> int:
    """How many ranks factors take on a lane; a bias takes one."""
    return factors.rank + (factors.bias is not None)


class LanePlan(Plan):
    """The weights (rows, K) of a batch over its lanes."""

    def __init__(self, topology: Topology, lanes: Lanes, weights: Tensor) -> None:
        self.topology = topology
        self.lanes = lanes
        padded = torch.cat([weights, weights.new_zeros(len(weights), 1)], dim=1)
        self.gates = {
            number: padded.to(group.a).gather(1, group.owners)[:, :, None] for number, group in lanes.groups.items()
        }

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
        self._lanes = plan.lanes
        self._gates = plan.gates
        self._rows = rows
        self._tokens = tokens
        self._group = -1
        self._input: Tensor | None = None
        self._hidden: Tensor | None = None

    def acts(self, index: int) -> bool:
        """Whether a row has an adapter at this site."""
        return self._lanes.sites[index] is not None

    def add(self, index: int, x: Tensor, y: Tensor) -> Tensor:
        """y plus the contribution of each row's adapters to x."""
        site = self._lanes.sites[index]
        if site is None:
            return y
        if self._hidden is None or self._input is not x or self._group != site.group:
            self._hidden = self._gated(site.group, x)
            self._input, self._group = x, site.group
        hidden = self._hidden[:, site.start : site.stop].transpose(1, 2)
        layout = self._lanes.groups[site.group].layout
        if y.dtype == site.b.dtype and is_usual(layout, x) and not y.requires_grad:
            return y.baddbmm_(hidden, site.b)
        return y.add_(as_before(torch.bmm(hidden, site.b), layout, x, self._rows, self._tokens))

    def _gated(self, number: int, x: Tensor) -> Tensor:
        """g * (A x^T), (rows, R, tokens)."""
        group = self._lanes.groups[number]
        by_row = rows_first(self.widened(x, group.a), group.layout, self._rows, self._tokens)
        hidden = torch.bmm(group.a, by_row.transpose(1, 2))
        if group.offset is not None:
            hidden += group.offset
        return hidden * self._gates[number]
