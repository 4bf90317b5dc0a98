"""What a stack of adapters adds to the products of a step on a CPU, by the loops of `kernels.py`.

Torch takes longer to begin a product with a few ranks than it takes to make it: of sixteen rows under mixes of two
adapters, these products were a quarter of a step.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from lora_rt.core.engine.layout import is_usual
from lora_rt.core.engine.stack import Stack
from lora_rt.core.engine.topology import Topology

_FEW = 2  # rows for which a loop is faster than torch's product with A, and than any that reads B across its memory


class _Group(NamedTuple):
    """A (R, in) and the gates (rows|1, 1, R) of a group of sites, as tensors and as arrays."""

    a: Tensor
    gate: Tensor
    a_array: Any
    gate_array: Any


class _Site(NamedTuple):
    """A site's ranks of its group's hidden, from `start` on; b (out, ranks), and whether a rank lies together in it."""

    group: int
    start: int
    b: Any
    together: bool


class SiteFactors(NamedTuple):
    """What is added at a plain site, as arrays of float32.

    `a` (rows|1, R, in) and `gate` (rows|1, 1, R) of its group, and `b` (rows|1, out, ranks) of the group's ranks from
    `start` on.
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

    def factors(self, index: int) -> SiteFactors | None:
        """What is added at a site; None where that is more than a product with A, a gate and one with B."""


class FewRows:
    """The plain sites of a plan: no scale, bias or gate that differs from head to head or token to token."""

    def __init__(self, kernels: Any, topology: Topology, stack: Stack, gates: dict[int, Tensor], headed: bool) -> None:
        self.kernels = kernels
        self._groups: dict[int, _Group] = {}
        for number, group in stack.groups.items():
            gate = gates[number]
            plain = group.offset is None and gate.shape[1] == 1 and group.a.dtype == torch.float32 == gate.dtype
            if plain and is_usual(group.layout, gate):
                gate = gate.contiguous()
                self._groups[number] = _Group(group.a, gate, group.a.numpy(), gate.numpy())
        self._nothing = [site is None for site in stack.sites]
        self._sites: list[_Site | None] = [None] * len(stack.sites)
        for index, site in enumerate(stack.sites):
            if site is None or site.group not in self._groups or site.scales is not None:
                continue
            if not (headed and index in topology.heads):
                self._sites[index] = _Site(site.group, site.start, site.b.numpy(), site.b.T.is_contiguous())

    def is_nothing(self, index: int) -> bool:
        """As of `Added`."""
        return self._nothing[index]

    def factors(self, index: int) -> SiteFactors | None:
        """As of `Added`."""
        site = self._sites[index]
        if site is None:
            return None
        group = self._groups[site.group]
        return SiteFactors(site.group, site.start, group.a_array[None], group.gate_array, site.b[None])

    def hidden(self, index: int, wide: Tensor) -> tuple[int, Any] | None:
        """The group of a site and its gated hidden of x (rows, 1, in), float32; None where the site is not plain."""
        site = self._sites[index]
        if site is None or not (site.together or len(wide) <= _FEW):
            return None
        group = self._groups[site.group]
        if len(wide) > _FEW:
            return site.group, linear(wide, group.a).mul_(group.gate).numpy()
        hidden = torch.empty(len(wide), 1, len(group.a), dtype=torch.float32).numpy()
        self.kernels.gated_ranks(wide.numpy(), group.a_array, group.gate_array, hidden)
        return site.group, hidden

    def group_of(self, index: int) -> int | None:
        """The group of a plain site."""
        site = self._sites[index]
        return None if site is None else site.group

    def add(self, index: int, hidden: Any, y: Tensor) -> None:
        """Add to a site's float32 y (rows, 1, out) what it makes of its group's hidden."""
        site = self._sites[index]
        assert site is not None
        self.kernels.add_ranks(y.numpy(), hidden, site.start, site.b)
