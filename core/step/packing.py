"""Rows of a batch one behind the other in a single row, without padding; what all of them begin with stands there once.

    padded     s y s a b c            packed     s y s a b c  d e
               s y s d e .

Whatever works token by token (all products, norms, the output head) is then done for real tokens alone, and once for a
system prompt that all rows share. Attention is not: there queries, keys and values are laid out in rows again, each row
attends to itself, and what comes out is packed again. Logits are made for the tokens alone that predict a label.

Dropout acts alike in all rows on what they share. Everything else is the same numbers, and so are the gradients.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_rt.core.base.shape import ForwardPass
from lora_rt.plugins.contract import IGNORE

NAME = "lora_rt_packing"
"""What a pass is told its packing by, down to the attention."""


@dataclass(frozen=True, slots=True)
class Packing:
    """A batch of (rows, width) as one row of so many tokens.

    `ids` and `positions` (1, tokens) are of the packed row; `places` (tokens,) is where each stands in the flattened
    batch, `spread` (rows * width,) which packed token stands at each place (any, where padding does). The first
    `shared` tokens are those that all rows begin with. `columns` (labels,) are the packed tokens that predict
    `labels` (labels,), row by row; `counts` (rows,) is how many each row has.
    """

    rows: int
    width: int
    shared: int
    ids: Tensor
    positions: Tensor
    places: Tensor
    spread: Tensor
    columns: Tensor
    labels: Tensor
    counts: Tensor

    @classmethod
    def of(cls, inputs: Mapping[str, Any]) -> Packing:
        """Of a batch padded on the right: "input_ids", "attention_mask" and "labels", all (rows, width)."""
        ids, labels = inputs["input_ids"], inputs["labels"]
        real = inputs["attention_mask"].bool()
        rows, width = ids.shape
        alike = (ids == ids[:1]).all(0) & real.all(0)
        shared = int(alike.long().cumprod(0).sum()) if rows > 1 else 0
        real[1:, :shared] = False
        places = real.flatten().nonzero().flatten()
        spread = (real.flatten().long().cumsum(0) - 1).view(rows, width) * real
        spread[1:, :shared] = spread[:1, :shared]
        wanted = labels[:, 1:] != IGNORE
        return cls(
            rows=rows,
            width=width,
            shared=shared,
            ids=ids.flatten()[places][None],
            positions=(places % width)[None],
            places=places,
            spread=spread.flatten(),
            columns=spread[:, :-1][wanted],
            labels=labels[:, 1:][wanted],
            counts=wanted.sum(1),
        )

    def arguments(self, forward: ForwardPass) -> dict[str, Any]:
        """The arguments of a pass, whose logits are (1, labels, vocab)."""
        return {
            "input_ids": self.ids,
            "position_ids": self.positions + forward.first_position,
            # One of four dimensions is taken as it is, so that none is made: whoever attends by rows needs none.
            "attention_mask": torch.ones((1, 1, 1, 1), dtype=torch.bool, device=self.ids.device),
            "use_cache": False,
            "logits_to_keep": self.columns,
            NAME: self,
        }

    def unpacked(self, x: Tensor) -> Tensor:
        """(1, heads, tokens, size) as (rows, heads, width, size)."""
        flat: Tensor = _Unpacked.apply(x.transpose(1, 2).squeeze(0), self)  # type: ignore[no-untyped-call]
        return flat.view(self.rows, self.width, *flat.shape[1:]).transpose(1, 2)

    def packed(self, x: Tensor) -> Tensor:
        """(rows, width, heads, size) as (1, tokens, heads, size)."""
        found: Tensor = _Packed.apply(x.flatten(0, 1), self)  # type: ignore[no-untyped-call]
        return found[None]


class _Packed(torch.autograd.Function):
    """(rows * width, heads, size) -> (tokens, heads, size)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return x.index_select(0, packing.places)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        packing = ctx.packing
        found = grads[0].new_zeros(packing.rows * packing.width, *grads[0].shape[1:])
        return found.index_copy_(0, packing.places, grads[0]), None


class _Unpacked(torch.autograd.Function):
    """(tokens, heads, size) -> (rows * width, heads, size); the gradients of what rows share are added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, packing: Packing) -> Tensor:
        ctx.packing = packing
        return x.index_select(0, packing.spread)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None]:
        packing = ctx.packing
        found = grads[0].index_select(0, packing.places)
        if shared := packing.shared:
            found[:shared] = grads[0].view(packing.rows, packing.width, *found.shape[1:])[:, :shared].sum(0)
        return found, None
