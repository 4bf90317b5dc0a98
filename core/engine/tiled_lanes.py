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

from lora_rt.core.engine.layout import USUAL
from lora_rt.core.engine.stack import Factors
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

    def __init__(self, topology: Topology, adapters: Sequence[Mapping[str, Factors]], weights: Tensor) -> None:
        """
        Args:
            adapters: those that the rows use. weights: (rows, K), 0 where a row does not use one.
        """
        self._topology, self._adapters, self._weights = topology, adapters, weights
        self._members = [row.nonzero().flatten().tolist() for row in weights]
        self._patterns: dict[tuple[int, ...], _Pattern] = {}  # the blocks of a model are alike
        self._gates: dict[tuple[tuple[int, ...], ...], Tensor] = {}
        self.groups = {number: self._looked_at(indices) for number, indices in topology.groups_of(adapters).items()}
        """None where a group has more than A and B, or tiles do not fit."""

    def _looked_at(self, indices: Sequence[int]) -> LaneRanks | None:
        sites = [self._topology.sites[index] for index in indices]
        found = [[adapter.get(site.name) for adapter in self._adapters] for site in sites]
        usual = sites[0].layout == USUAL and not sites[0].embeds
        if not usual or not all(_is_plain(one) for of_site in found for one in of_site if one is not None):
            return None
        kinds = [tuple(one.rank if one else 0 for one in of_site) for of_site in found]
        patterns = [self._pattern(kind) for kind in kinds]
        width = sites[0].in_features
        a = [
            _places([one.a if one else None for one in of_site], pattern)
            for of_site, pattern in zip(found, patterns, strict=True)
        ]
        made: dict[int, tuple[int, Ranks]] = {}
        start = 0
        for index, site, of_site, pattern in zip(indices, sites, found, patterns, strict=True):
            turned = [one.b.T if one else None for one in of_site]
            made[index] = start, in_lanes(_places(turned, pattern), site.out_features, turned)
            start += pattern.owners.shape[1]
            if not are_outputs((site.out_features, whole_ranks(pattern.owners.shape[1]))):
                return None
        if not fits((start, width)):
            return None
        return LaneRanks(in_lanes(np.concatenate(a, axis=1), width, found), self._gates_of(tuple(kinds)), made)

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
            weights = torch.nn.functional.pad(self._weights.float(), (0, 1)).gather(1, owners)
            self._gates[kinds] = torch.nn.functional.pad(weights, (0, whole_ranks(owners.shape[1]) - owners.shape[1]))
        return self._gates[kinds]


def _is_plain(factors: Factors) -> bool:
    """Whether they are ranks that lie there one after the other, and nothing else."""
    a, b = factors.a, factors.b
    if factors.bias is not None or factors.scale is not None or a.dim() != 2 or not a.is_cpu:
        return False
    return a.dtype is b.dtype is torch.float32 and a.is_contiguous() and b.T.is_contiguous()


def _places(parts: Sequence[Tensor | None], pattern: _Pattern) -> Any:
    """(rows, ranks), where each rank lies, of parts (r, width); 0 where there is none."""
    size = next(4 * part.shape[1] for part in parts if part is not None)
    first = np.array([0 if part is None else part.data_ptr() for part in parts] + [0], np.int64)[pattern.owners]
    return np.where(first == 0, 0, first + size * pattern.slots)
