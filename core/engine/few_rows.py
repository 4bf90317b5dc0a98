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
from lora_rt.core.engine.stack import Stack
from lora_rt.core.engine.topology import Topology

_ANY = 4  # rows for which pieces are as fast as a stack, however many adapters each uses
_SHARE = 0.5  # of a stack's adapters that rows may use in the mean, where more of them are still as fast
_FEW = 2  # rows for which a loop is faster than torch's product with A


class SiteFactors(NamedTuple):
    """What is added at a plain site, as arrays of float32.

    `a` (R, in) and `gate` (rows|1, 1, R) of its group, and `b` (out, ranks) of the group's ranks from `start` on.
    """

    group: int
    start: int
    a: Any
    gate: Any
    b: Any


class AddedToSteps(Protocol):
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
        self._stack = stack
        self._gates: dict[int, tuple[Tensor, Any]] = {}  # (rows|1, 1, R) of plain groups, as a tensor and as an array
        for number, group in stack.groups.items():
            gate = gates[number]
            plain = group.offset is None and gate.shape[1] == 1 and group.like.dtype == torch.float32 == gate.dtype
            if plain and is_usual(group.layout, gate):
                gate = gate.contiguous()
                self._gates[number] = gate, gate.numpy()
        heads = topology.heads if headed else {}
        self._plain = [
            site if site and site.group in self._gates and site.scales is None and index not in heads else None
            for index, site in enumerate(stack.sites)
        ]

    def is_nothing(self, index: int) -> bool:
        """As of `AddedToSteps`."""
        return self._stack.sites[index] is None

    def pieces(self, indices: Sequence[int], rows: int) -> Pieces | None:
        """As of `AddedToSteps`."""
        sites = [self._plain[index] for index in indices]
        if self._own is None or len(self._weights) not in (1, rows) or not all(sites):
            return None
        acting = [(row, k) for row in range(rows) for k in self._acting(row)]
        if rows > _ANY and len(acting) > _SHARE * rows * self._weights.shape[1]:
            return None
        own_row, numbers = np.array(acting, np.int64).reshape(-1, 2).T
        places = np.empty((len(acting), len(sites)), np.int64)
        gates = []
        for column, site in enumerate(sites):
            assert site is not None
            gate = self._gates[site.group][1]
            if len(gate) not in (1, rows):
                return None
            first = np.array([start for start, _ in site.spans], np.int64)
            apart = 0 if len(gate) == 1 else gate.shape[2]
            places[:, column] = gate.ctypes.data + gate.itemsize * (site.start + first[numbers] + apart * own_row)
            gates.append(gate)
        return self._own(acting, indices, (places, gates))

    def _acting(self, row: int) -> list[int]:
        """The numbers of a row's own adapters; what is not a number in another one's is none of it."""
        own = self._weights[min(row, len(self._weights) - 1)]
        return [k for k, weight in enumerate(own.tolist()) if weight != 0]

    def factors(self, index: int) -> SiteFactors | None:
        """As of `AddedToSteps`."""
        site = self._plain[index]
        if site is None:
            return None
        a, (_, gate) = self._stack.groups[site.group].a, self._gates[site.group]
        return SiteFactors(site.group, site.start, a.numpy(), gate, site.b.numpy())

    def group_of(self, index: int) -> int | None:
        """The group of a plain site."""
        site = self._plain[index]
        return None if site is None else site.group

    def hidden(self, group: int, wide: Tensor) -> Any:
        """The gated hidden of a plain site's group, of x (rows, 1, in), float32."""
        a, (gate, gate_array) = self._stack.groups[group].a, self._gates[group]
        if len(wide) > _FEW:
            return linear(wide, a).mul_(gate).numpy()
        hidden = torch.empty(len(wide), 1, len(a), dtype=torch.float32).numpy()
        self.kernels.gated_ranks(wide.numpy(), a.numpy(), gate_array, hidden)
        return hidden

    def add(self, index: int, hidden: Any, y: Tensor) -> None:
        """Add to a plain site's float32 y (rows, 1, out) what it makes of its group's hidden."""
        site = self._plain[index]
        assert site is not None
        self.kernels.add_ranks(y.numpy(), hidden, site.start, site.b.numpy())
