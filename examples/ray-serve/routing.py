"""Which replica answers a request: one that has its adapters, unless that one has too much to do."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping
from typing import TypeVar

import lora_rt

Replica = TypeVar("Replica", bound=Hashable)


def adapters_of(model: str) -> tuple[str, ...]:
    """The adapters that a `model` names; none for the base, and for what is no composition: any replica will do."""
    try:
        terms = lora_rt.Composition.parse(model).terms
    except lora_rt.LoraRtError:
        return ()
    return tuple(sorted({term.reference.text for term in terms} - {"base"}))


def choose(
    adapters: Collection[str],
    residents: Mapping[Replica, Collection[str]],
    load: Mapping[Replica, int],
    slack: float = 1.25,
    room: int = 16,
) -> Replica:
    """The replica that lacks the fewest of the adapters; of those the least busy, then the one with fewest adapters.

    Args:
        adapters: those of the request.
        residents: replica -> the adapters that it has in memory.
        load: replica -> its requests that are not done; the replicas to choose from.
        slack: a replica with this many times the mean load is left out, unless it has room all the same. Large values
            keep adapters where they are, 1 spreads the load as evenly as can be.
        room: how many requests a replica answers in one batch (`--max-rows`): with fewer than that it is not busy.
    """
    limit = max(room, math.ceil(slack * (sum(load.values()) + 1) / len(load)))
    open_ones = [replica for replica, busy in load.items() if busy < limit]

    def cost(replica: Replica) -> tuple[int, int, int]:
        there = residents.get(replica, ())
        return sum(name not in there for name in adapters), load[replica], len(there)

    return min(open_ones, key=cost)
