"""What a stack of adapters adds to the products of a step on a CPU, by the loops of `kernels.py`.

Torch takes longer to begin a product with a few ranks than it takes to make it: of sixteen rows under mixes of two
adapters, these products were a quarter of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from lora_rt.core.engine.layout import is_usual
from lora_rt.core.engine.pieces import Pieces
from lora_rt.core.engine.stack import Stack, StackedGroup, StackedSite
from lora_rt.core.engine.topology import Topology

_ANY = 4  # rows for which pieces are as fast as a stack, however many adapters each uses
_SHARE = 0.5  # of a stack's adapters that rows may use in the mean, where more of them are still as fast
_FEW = 2  # rows for which a loop is faster than torch's product with A, and than any that reads B across its memory


class _Group(NamedTuple):
    """A group of sites, and its gates (rows|1, 1, R) as a tensor and as an array."""

    of: StackedGroup
    gate: Tensor
    gate_array: Any


class _Site(NamedTuple):
    """A site, and its ranks of its group's hidden, from `start` on."""

    group: int
    start: int
    of: StackedSite


class SiteFactors(NamedTuple):
    """What is added at a plain site, as arrays of float32.

    `a` (R, in) and `gate` (rows|1, 1, R) of its group, and `b` (out, ranks) of the group's ranks from `start` on.
    """

    group: int
    start: int
    a: Any
    gate: Any
    b: Any


class Added(Protocol):
    """What a plan adds to the products of a step."""

    def is_nothing(self, index: int) -> bool:
        """Whether nothing acts at a site."""

    def pieces(self, indices: Sequence[int], rows: int) -> Pieces | None:
        """What is added to so many rows at these sites; None where it is in no pieces, or better laid out."""

    def factors(self, index: int) -> SiteFactors | None:
        """What is added at a site; None where that is more than a product with A, a gate and one with B."""


class FewRows:
    """The plain sites of a plan: no scale, bias or gate that differs from head to head or token to token."""

    def __init__(
        self,
        kernels: Any,
        topology: Topology,
        stack: Stack,
        gates: dict[int, Tensor],
        headed: bool,
        own: Callable[..., Pieces | None] | None,
        weights: Tensor,
    ) -> None:
        """
        Args:
            gates: of each group. headed: whether some differ from head to head.
            own: what gives the active adapters' pieces, of `OwnFactors`. weights: (rows|1, K).
        """
        self.kernels = kernels
        self._own, self._weights = own, weights
        self._spans = [() if site is None else site.spans for site in stack.sites]
        self._groups: dict[int, _Group] = {}
        for number, group in stack.groups.items():
            gate = gates[number]
            plain = group.offset is None and gate.shape[1] == 1 and group.like.dtype == torch.float32 == gate.dtype
            if plain and is_usual(group.layout, gate):
                gate = gate.contiguous()
                self._groups[number] = _Group(group, gate, gate.numpy())
        self._nothing = [site is None for site in stack.sites]
        self._sites: list[_Site | None] = [None] * len(stack.sites)
        for index, site in enumerate(stack.sites):
            if site is None or site.group not in self._groups or site.scales is not None:
                continue
            if not (headed and index in topology.heads):
                self._sites[index] = _Site(site.group, site.start, site)

    def is_nothing(self, index: int) -> bool:
        """As of `Added`."""
        return self._nothing[index]

    def pieces(self, indices: Sequence[int], rows: int) -> Pieces | None:
        """As of `Added`."""
        sites = [self._sites[index] for index in indices]
        if self._own is None or len(self._weights) not in (1, rows) or not all(sites):
            return None
        acting = [(row, k) for row in range(rows) for k in self._acting(row)]
        if rows > _ANY and len(acting) > _SHARE * rows * self._weights.shape[1]:
            return None
        own_row, numbers = np.array(acting, np.int64).reshape(-1, 2).T
        places = np.empty((len(acting), len(sites)), np.int64)
        gates = []
        for column, (index, site) in enumerate(zip(indices, sites, strict=True)):
            assert site is not None
            gate = self._groups[site.group].gate_array
            if len(gate) not in (1, rows):
                return None
            first = np.array([start for start, _ in self._spans[index]], np.int64)
            apart = 0 if len(gate) == 1 else gate.shape[2]
            places[:, column] = gate.ctypes.data + gate.itemsize * (site.start + first[numbers] + apart * own_row)
            gates.append(gate)
        return self._own(acting, indices, (places, gates))

    def _acting(self, row: int) -> list[int]:
        """The numbers of a row's own adapters; what is not a number in another one's is none of it."""
        own = self._weights[min(row, len(self._weights) - 1)]
        return [k for k, weight in enumerate(own.tolist()) if weight != 0]

    def factors(self, index: int) -> SiteFactors | None:
        """As of `Added`."""
        site = self._sites[index]
        if site is None:
            return None
        group = self._groups[site.group]
        return SiteFactors(site.group, site.start, group.of.a.numpy(), group.gate_array, site.of.b.numpy())

    def hidden(self, index: int, wide: Tensor) -> tuple[int, Any] | None:
        """The group of a site and its gated hidden of x (rows, 1, in), float32; None where the site is not plain."""
        site = self._sites[index]
        if site is None or not (len(wide) <= _FEW or site.of.b.T.is_contiguous()):
            return None
        group = self._groups[site.group]
        a = group.of.a
        if len(wide) > _FEW:
            return site.group, linear(wide, a).mul_(group.gate).numpy()
        hidden = torch.empty(len(wide), 1, len(a), dtype=torch.float32).numpy()
        self.kernels.gated_ranks(wide.numpy(), a.numpy(), group.gate_array, hidden)
        return site.group, hidden

    def group_of(self, index: int) -> int | None:
        """The group of a plain site."""
        site = self._sites[index]
        return None if site is None else site.group

    def add(self, index: int, hidden: Any, y: Tensor) -> None:
        """Add to a site's float32 y (rows, 1, out) what it makes of its group's hidden."""
        site = self._sites[index]
        assert site is not None
        self.kernels.add_ranks(y.numpy(), hidden, site.start, site.of.b.numpy())
