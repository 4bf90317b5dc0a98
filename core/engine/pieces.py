"""What adapters add to a step of one token a row, read where the residents keep it: nothing is laid out for a set.

A piece is what one adapter adds to one row at one site. Of a row under emotion with r = 8 and logic with r = 4:

    piece 0   A (8, 576)   B (8, out)   its hidden is 0 .. 7 of the row's    times the gate of each rank
    piece 1   A (4, 576)   B (4, out)                 8 .. 11

A step reads every factor once a row, and waits for little else. Where all numbers of an adapter are bfloat16's, as most
adapters are saved, a copy in bfloat16 is kept beside it, which is the same numbers in half the memory. Nobody changes a
resident's factors in place: another adapter takes its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from lora_rt.core.engine.layout import USUAL
from lora_rt.core.engine.resident import ResidentAdapter
from lora_rt.core.engine.stack import Factors
from lora_rt.core.engine.topology import Topology

A, B, RANKS, IN, OUT, FACTS = range(6)
"""Of an adapter at a site: where A (r, in) and B (r, out) lie, row after row, and r, in and out. All are 0 where it
does not act, and r is -1 where it does more than a product with A, a gate and one with B."""


class Pieces(NamedTuple):
    """What acts on the rows of a batch at some sites: M pieces at each.

    Args:
        facts: (M, sites, FACTS) int64, see `A`.
        rows: (M,) the row of each, in rising order.
        narrow: (M,) whether A and B are in bfloat16, else in float32.
        gates: (M, sites) int64, where the float32 gates of its ranks lie.
        made_of: whose addresses these are; they stay while this is there.
    """

    facts: Any
    rows: Any
    narrow: Any
    gates: Any
    made_of: Any


class _Own(NamedTuple):
    """One adapter's factors by the number of their site, (sites, FACTS), and the tensors that lie there.

    `wide` (sites, 2) is where A and B lie in float32.
    """

    facts: Any
    wide: Any
    narrow: bool
    tensors: list[Tensor]


class OwnFactors:
    """The factors of residents as steps read them; each adapter's are looked at when they are first asked for."""

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        self._known: WeakKeyDictionary[ResidentAdapter, _Own] = WeakKeyDictionary()

    def pieces(
        self, active: Sequence[ResidentAdapter], members: Sequence[tuple[int, int]], indices: Sequence[int], gates: Any
    ) -> Pieces | None:
        """What acts on rows at the sites of these numbers; None where that is more than pieces say.

        Args:
            active: the adapters of a plan.
            members: row and adapter, by its number among these, of each piece, in order of the rows.
            gates: the addresses, (M, sites), and what lies there.
        """
        own = [self._of(resident) for resident in active]
        rows, numbers = np.array(members, np.int64).reshape(-1, 2).T  # (M,) each
        facts = np.stack([one.facts for one in own])[numbers][:, list(indices)]  # (M, sites, FACTS)
        if (facts[:, :, RANKS] < 0).any():
            return None
        return Pieces(facts, rows, np.array([one.narrow for one in own])[numbers], gates[0], (own, gates[1]))

    def wide(self, active: Sequence[ResidentAdapter]) -> Any:
        """(K, sites, FACTS) of the adapters of a plan, whose A and B are those in float32."""
        own = [self._of(resident) for resident in active]
        facts = np.stack([one.facts for one in own])  # (K, all sites, FACTS)
        facts[:, :, :RANKS] = np.stack([one.wide for one in own])  # (K, all sites, 2)
        return facts

    def nbytes_of(self, resident: ResidentAdapter) -> int:
        """The memory of a copy that was made of a resident's factors; 0 while nobody has read them so."""
        found = self._known.get(resident)
        return 0 if found is None or not found.narrow else sum(tensor.nbytes for tensor in found.tensors)

    def _of(self, resident: ResidentAdapter) -> _Own:
        found = self._known.get(resident)
        if found is None:
            found = self._known[resident] = self._looked_at(resident.factors)
        return found

    def _looked_at(self, factors: Mapping[str, Factors]) -> _Own:
        facts = np.zeros((len(self._topology.sites), FACTS), np.int64)  # (all sites, FACTS)
        places = {name: self._topology.by_name[name] for name in factors}
        plain = {name: (one.a, one.b.T) for name, one in factors.items() if self._is_plain(places[name], one)}
        narrow = bool(plain) and all(_is_narrow(tensor) for pair in plain.values() for tensor in pair)
        found = [plain[name] for name in sorted(plain, key=places.__getitem__)]
        tensors = [tensor for pair in found for tensor in pair]
        if narrow:
            # In the order in which a step reads them: what comes next is fetched while the last is multiplied.
            sizes = [tensor.numel() for tensor in tensors]
            tensors = list(torch.split(torch.cat([tensor.flatten().bfloat16() for tensor in tensors]), sizes))
        for name in places.keys() - plain.keys():
            facts[places[name], RANKS] = -1
        wide = np.zeros((len(facts), RANKS), np.int64)  # (all sites, 2)
        for n, index in enumerate(sorted(map(places.__getitem__, plain))):
            a, b = found[n]  # (r, in), (r, out)
            facts[index] = tensors[2 * n].data_ptr(), tensors[2 * n + 1].data_ptr(), *a.shape, b.shape[1]
            wide[index] = a.data_ptr(), b.data_ptr()
        return _Own(facts, wide, narrow, tensors)

    def _is_plain(self, index: int, factors: Factors) -> bool:
        site, a, b = self._topology.sites[index], factors.a, factors.b
        alone = factors.bias is None and factors.scale is None and not site.embeds and a.dim() == 2
        lie = alone and a.is_contiguous() and b.T.is_contiguous() and site.layout == USUAL
        return lie and a.is_cpu and a.dtype is b.dtype is torch.float32


def _is_narrow(tensor: Tensor) -> bool:
    """Whether bfloat16 holds every number of a tensor; what is no number is not asked for."""
    return torch.equal(tensor.bfloat16().float(), tensor)
