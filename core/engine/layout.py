"""Where rows and tokens lie in what a layer gets: found once, by passes of two sizes.

    (rows, tokens, n)           most layers                 ("b", "t")
    (rows * tokens, n)          GPT-2's Conv1D, experts     ("bt",)
    (rows, 1, tokens, n)        latent attention            ("b", "", "t")
    (tokens, rows, n)                                       ("t", "b")

Worked example: passes of 2 x 3 and of 3 x 5 tokens gave a layer inputs of (2, 1, 3, n) and (3, 1, 5, n). The axis that
was 2 and 3 long counts rows, the one that was 3 and 5 long counts tokens, and the other one counts neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from lora_rt.errors import LoraRtError

Axis = Literal["b", "t", "bt", "tb", ""]
"""Rows, tokens, rows times tokens in either order, or neither."""
Layout = tuple[Axis, ...]
"""Of every axis but the last, which counts features."""

PROBES = ((2, 3), (3, 5))
"""(rows, tokens) of the passes; the rows of each are alike."""
USUAL: Layout = ("b", "t")
"""Of most layers."""


class PassError(LoraRtError):
    """A layer does not get what a plan can gate."""


def layout_of(inputs: Sequence[Tensor]) -> Layout | None:
    """The layout of a layer's inputs, one of each of the `PROBES`; None where its axes say nothing of rows."""
    if len({x.dim() for x in inputs}) != 1:
        return None
    found = tuple(_axis([x.shape[axis] for x in inputs]) for axis in range(inputs[0].dim() - 1))
    counts = "".join(axis or "" for axis in found)
    if None in found or sorted(counts) != ["b", "t"]:
        return None
    layout: Layout = tuple(axis or "" for axis in found)
    if "bt" in layout and not _alike(inputs[0], layout):
        layout = tuple("tb" if axis == "bt" else axis for axis in layout)
        return layout if _alike(inputs[0], layout) else None
    return layout


def _axis(sizes: Sequence[int]) -> Axis | None:
    if tuple(sizes) == tuple(rows for rows, _ in PROBES):
        return "b"
    if tuple(sizes) == tuple(tokens for _, tokens in PROBES):
        return "t"
    if tuple(sizes) == tuple(rows * tokens for rows, tokens in PROBES):
        return "bt"
    return "" if len(set(sizes)) == 1 else None


def _alike(x: Tensor, layout: Layout) -> bool:
    """Whether the rows are alike where this layout says that they lie."""
    first, *others = rows_first(x, layout, *PROBES[0])
    try:
        return all(torch.allclose(first, other, atol=1e-2, rtol=1e-2) for other in others)
    except RuntimeError:  # a fake tensor has no values; memory does not depend on the order
        return True


def is_usual(layout: Layout | None, x: Tensor) -> bool:
    """Whether x is (rows, tokens, n)."""
    return layout == USUAL and x.dim() == 3


def spread(
    gate: Tensor, layout: Layout | None, x: Tensor, rows: int, tokens: int, kept: slice | Tensor | None
) -> Tensor:
    """A gate (rows|1, tokens|1, n) in the layout of x.

    `kept` are the tokens that the output head gets, where it gets some of them.

    Raises:
        PassError: it is not the same for all tokens, and the layer does not say which ones it gets.
    """
    if gate.shape[0] == gate.shape[1] == 1:
        return gate.view(gate.shape[-1])
    if is_usual(layout, x):
        if gate.shape[1] in (1, x.shape[1]):
            return gate
        return gate[:, kept.to(gate.device) if isinstance(kept, Tensor) else kept]
    if layout is None or len(layout) != x.dim() - 1:
        raise _unknown(x, rows * tokens)
    if "b" in layout and "t" in layout:
        gate = gate if layout.index("b") < layout.index("t") else gate.transpose(0, 1)
        for axis, what in enumerate(layout):
            gate = gate if what else gate.unsqueeze(axis)
        return gate
    (axis,) = (number for number, what in enumerate(layout) if what)
    if x.shape[axis] != rows * tokens:
        raise _unknown(x, rows * tokens)
    whole = gate.expand(rows, tokens, -1)
    flat = (whole if layout[axis] == "bt" else whole.transpose(0, 1)).reshape(rows * tokens, -1)
    return flat.view(*(1,) * axis, rows * tokens, *(1,) * (len(layout) - 1 - axis), -1)


def rows_first(x: Tensor, layout: Layout | None, rows: int, tokens: int) -> Tensor:
    """(rows, everything else, n) of an x in this layout; `tokens` of each row.

    Raises:
        PassError: the layer does not say which tokens it gets.
    """
    if is_usual(layout, x):
        return x
    if layout is None or len(layout) != x.dim() - 1:
        raise _unknown(x, rows * tokens)
    if "b" in layout:
        return x.movedim(layout.index("b"), 0).flatten(1, -2)
    return _apart(x, layout, rows, tokens).flatten(1, -2)


def as_before(found: Tensor, layout: Layout | None, x: Tensor, rows: int, tokens: int) -> Tensor:
    """What was made of `rows_first`, (rows, everything else, n), in the layout of x."""
    if layout is None or is_usual(layout, x):
        return found
    if "b" in layout:
        axis = layout.index("b")
        rest = [size for number, size in enumerate(x.shape[:-1]) if number != axis]
        return found.reshape(rows, *rest, -1).movedim(0, axis)
    like = _apart(x, layout, rows, tokens)
    whole = found.reshape(*like.shape[:-1], -1)  # (rows, tokens, others, n)
    (axis,) = (number for number, what in enumerate(layout) if what)
    whole = whole if layout[axis] == "bt" else whole.transpose(0, 1)
    return whole.flatten(0, 1).movedim(0, axis)


def _apart(x: Tensor, layout: Layout, rows: int, tokens: int) -> Tensor:
    """(rows, tokens, others, n) of an x whose rows and tokens share an axis."""
    (axis,) = (number for number, what in enumerate(layout) if what)
    if x.shape[axis] != rows * tokens:
        raise _unknown(x, rows * tokens)
    front = x.movedim(axis, 0)
    if layout[axis] == "bt":
        return front.reshape(rows, tokens, *front.shape[1:])
    return front.reshape(tokens, rows, *front.shape[1:]).transpose(0, 1)


def _unknown(x: Tensor, tokens: int) -> PassError:
    return PassError(
        f"a layer gets {x.shape[:-1].numel()} of {tokens} tokens, without saying which",
        next_step="Give all rows the same composition without gates per token, or use adapters that leave it alone",
    )
