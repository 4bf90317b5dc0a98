"""The lanes of a batch where the residents keep their factors, as tiles read them: nothing is gathered.

    lane of row 0   emotion 0 .. 7, nothing 8 .. 11         a group's A by the addresses of its ranks, (2, 12)
    lane of row 1   logic 0 .. 3, body 4 .. 11              B of each site likewise

Only where adapters are nothing but A and B; what else there is is gathered (`lanes.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from lora_rt.core.engine.pieces import OUT, RANKS, A, B, OwnFactors
from lora_rt.core.engine.resident import ResidentAdapter
from lora_rt.core.engine.tiled_factors import are_outputs, fits, whole_ranks
from lora_rt.core.engine.topology import Topology
from lora_rt.core.multiply.many import Ranks, in_lanes


class _Pattern(NamedTuple):
    """Of the ranks at a site the adapter, K where there is none, and the number in it; both (rows, ranks)."""

    owners: Any
    slots: Any


class LaneRanks(NamedTuple):
    """Sites with one input: A, `gates` (rows, R) of whole tiles, and of each site its first rank among these and B."""

    a: Ranks
    gates: Tensor
    sites: Mapping[int, tuple[int, Ranks]]


class TiledLanes:
    """The groups of a model as a batch's rows use them.

    All are looked at at once: small things that are made between the large ones of a pass keep it from using memory
    again.
    """

    def __init__(self, topology: Topology, active: Sequence[ResidentAdapter], own: OwnFactors, weights: Tensor) -> None:
        """
        Args:
            active: the adapters that the rows use. own: knows where their factors lie.
            weights: (rows, K), 0 where a row does not use one.
        """
        self._topology, self._active, self._weights = topology, active, weights
        self._facts = facts = own.wide(active)
        self._members = [row.nonzero().flatten().tolist() for row in weights]
        self._patterns: dict[tuple[int, ...], _Pattern] = {}  # the blocks of a model are alike
        self._gates: dict[tuple[tuple[int, ...], ...], Tensor] = {}
        acting: dict[int, list[int]] = {}
        for index in facts[:, :, RANKS].any(axis=0).nonzero()[0].tolist():
            acting.setdefault(topology.sites[index].group, []).append(index)
        self.groups = {number: self._looked_at(indices) for number, indices in acting.items()}
        """None where a group has more than A and B, or tiles do not fit."""

    def _looked_at(self, indices: Sequence[int]) -> LaneRanks | None:
        facts = self._facts[:, indices]  # (K, sites of the group, FACTS)
        kinds = tuple(map(tuple, facts[:, :, RANKS].T.tolist()))
        if (facts[:, :, RANKS] < 0).any():
            return None
        patterns = [self._pattern(kind) for kind in kinds]
        width = self._topology.sites[indices[0]].in_features
        a = [_places(facts[:, n, A], width, pattern) for n, pattern in enumerate(patterns)]
        made: dict[int, tuple[int, Ranks]] = {}
        start = 0
        for n, (index, pattern) in enumerate(zip(indices, patterns, strict=True)):
            out, ranks = int(facts[:, n, OUT].max()), pattern.owners.shape[1]
            if not are_outputs((out, whole_ranks(ranks))):
                return None
            made[index] = start, in_lanes(_places(facts[:, n, B], out, pattern), out, self._active)
            start += ranks
        if not fits((start, width)):
            return None
        return LaneRanks(in_lanes(np.concatenate(a, axis=1), width, self._active), self._gates_of(kinds), made)

    def _pattern(self, ranks: tuple[int, ...]) -> _Pattern:
        """Of a site where adapters have so many ranks."""
        if ranks not in self._patterns:
            nobody = len(ranks)
            lanes = [[(k, slot) for k in row for slot in range(ranks[k])] for row in self._members]
            longest = max(map(len, lanes))
            whole = np.array([lane + [(nobody, 0)] * (longest - len(lane)) for lane in lanes], np.int64)
            self._patterns[ranks] = _Pattern(whole[:, :, 0], whole[:, :, 1])
        return self._patterns[ranks]

    def _gates_of(self, kinds: tuple[tuple[int, ...], ...]) -> Tensor:
        if kinds not in self._gates:
            owners = torch.from_numpy(np.concatenate([self._pattern(ranks).owners for ranks in kinds], axis=1))
            gates = pad(self._weights.float(), (0, 1)).gather(1, owners)
            self._gates[kinds] = pad(gates, (0, whole_ranks(gates.shape[1]) - gates.shape[1]))
        return self._gates[kinds]


def _places(first: Any, width: int, pattern: _Pattern) -> Any:
    """(rows, ranks), where each rank lies, of factors (r, width) that begin there; 0 where there is none."""
    begins = np.append(first, 0)[pattern.owners]
    return np.where(begins == 0, 0, begins + 4 * width * pattern.slots)
