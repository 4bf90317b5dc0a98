"""What adapters add to a step in one call, as a table of numbers and addresses that `whole_kernel.py` reads."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from lora_rt.core.engine.few_rows import AddedToSteps
from lora_rt.core.engine.pieces import FACTS, IN, OUT, RANKS, A, B, Pieces
from lora_rt.core.forward import whole_kernel as k

_LINE = 8  # ranks: threads keep their sums in as many int64, which lie in no line of the caches together
GROUPS = (0, 0, 0, 1, 2, 2, 3)  # of the seven layers: those that read one x


class Adapters(NamedTuple):
    """What a plan adds: the table and the arrays that it points to.

    `ranks` of its widest group; `rows` of gates or factors that are a row's own, 1 for none.
    """

    table: Any
    made_of: Any
    ranks: int
    rows: int


def adapters_of(
    shapes: Sequence[tuple[int, int]], numbers: Sequence[int | None], added: AddedToSteps, rows: int
) -> Adapters | None:
    """What a plan adds to a step of so many rows; None where it has more than the kernel knows.

    Args:
        shapes: (in, out) of each of a block's seven layers.
        numbers: of each layer, block by block, that in the plan's topology.
    """
    acting = {place: n for place, n in enumerate(numbers) if n is not None and not added.is_nothing(n)}
    if not acting:  # it acts elsewhere, as on the output head, or its bank was closed
        return Adapters(np.zeros((len(numbers) // len(shapes), k.ADAPTED), np.int64), (), 1, 1)
    pieces = added.pieces(list(acting.values()), rows)
    if pieces is None:
        return _stacked(shapes, numbers, added)
    return _in_pieces(shapes, len(numbers), list(acting), pieces, rows)


def _in_pieces(
    shapes: Sequence[tuple[int, int]], layers: int, places: Sequence[int], pieces: Pieces, rows: int
) -> Adapters | None:
    """The table of the pieces that act at some layers."""
    sites = len(shapes)
    count = layers // sites
    facts = np.zeros((len(pieces.rows), count, sites, FACTS), np.int64)
    gates = np.zeros(facts.shape[:3], np.int64)
    at = np.divmod(places, sites)
    facts[:, *at], gates[:, *at] = pieces.facts, pieces.gates
    ranks = facts[..., RANKS]
    if ((facts[..., [IN, OUT]] != shapes) & (ranks > 0)[..., None]).any():
        return None
    starts, widest = np.zeros_like(ranks), 1
    for first, last in pairwise(k.FIRST):
        used = np.zeros((rows, count), np.int64)
        for site in range(first, last):
            for piece, row in enumerate(pieces.rows):
                starts[piece, :, site] = used[row]
                used[row] += ranks[piece, :, site]
        widest = max(widest, int(used.max()), _LINE)
    made = np.zeros((count, sites, len(pieces.rows), k.PIECE), np.int64)
    made[..., k.P_ROW], made[..., k.P_NARROW] = pieces.rows, pieces.narrow
    made[..., [k.P_A, k.P_B, k.P_RANKS]] = facts[..., [A, B, RANKS]].transpose(1, 2, 0, 3)
    made[..., k.P_START], made[..., k.P_GATE] = starts.transpose(1, 2, 0), gates.transpose(1, 2, 0)
    table = np.zeros((count, k.ADAPTED), np.int64)
    for number in range(count):
        acting = np.any(ranks[:, number] > 0, axis=0)
        for group, (first, last) in enumerate(pairwise(k.FIRST)):
            if acting[first:last].any():
                own, field = made[number, first:last], k.GROUP * group
                table[number, [field + k.A_AT, field + k.A_PIECES]] = own.ctypes.data, own.size // k.PIECE
        for site in np.flatnonzero(acting).tolist():
            own, field = made[number, site], k.SITES + k.SITE * site
            table[number, [field + k.B_AT, field + k.B_PIECES]] = own.ctypes.data, len(own)
    return Adapters(table, (pieces, made), widest, rows)


def _stacked(shapes: Sequence[tuple[int, int]], numbers: Sequence[int | None], added: AddedToSteps) -> Adapters | None:
    """The table of factors that all rows share; None where there is more."""
    count = len(numbers) // len(shapes)
    table = np.zeros((count, k.ADAPTED), np.int64)
    made_of: list[Any] = []
    widest, rows = 1, 1
    groups: dict[tuple[int, int], int] = {}
    for place, index in enumerate(numbers):
        number, site = divmod(place, len(shapes))
        if index is None or added.is_nothing(index):
            continue
        factors = added.factors(index)
        if factors is None:
            return None
        group = GROUPS[site]
        if groups.setdefault((number, group), factors.group) != factors.group:
            return None
        a, gate, b = factors.a, factors.gate, factors.b
        ranks = len(a)
        if (a.shape[1], len(b)) != shapes[site] or factors.start + b.shape[1] > ranks:
            return None
        together = b.dtype == np.float32 and b.strides[0] == b.itemsize  # the outputs of each rank
        if not (_is_flat(a) and together and gate.flags.c_contiguous and gate.shape[2] == ranks):
            return None
        at, of_a = k.GROUP * group, [step // a.itemsize for step in a.strides]
        table[number, at : at + k.GROUP] = a.ctypes.data, 0, ranks, *of_a, gate.ctypes.data, len(gate)
        at = k.SITES + k.SITE * site
        table[number, at : at + k.SITE] = b.ctypes.data, 0, b.shape[1], factors.start, b.strides[1] // b.itemsize
        made_of += [a, gate, b]
        widest = max(widest, ranks)
        several = {1, rows, len(gate)} - {1}
        if len(several) > 1:
            return None
        rows = max(several, default=1)
    return Adapters(table, made_of, widest, rows)


def _is_flat(array: Any) -> bool:
    """Whether a matrix of float32 lies in memory row by row or column by column."""
    return array.dtype == np.float32 and array.itemsize in array.strides and min(array.strides) > 0
