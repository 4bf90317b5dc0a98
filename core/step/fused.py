"""A layer and its adapter as one product on a CPU, while it trains: y = W x + s B (A x), rounded once.

PEFT lets the layer round its output, casts its input a second time and adds what the adapter gives in passes of their
own; each of them reads and writes (tokens, width) numbers, which together cost about as much as a product. Here input
and gradient are cast once, and the adapter's product is added up where the layer's stands. Layers that read one input
(q, k and v; gate and up) are made together: their A are one product, as in the engine, and so are their gradients.

The mathematics is PEFT's; in float32 the gradients are its own. Dropout is drawn once for each input, as PEFT does
where a model has q, k and v in one layer: each layer drops as much as it did, but those of one input the same places.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from lora_rt.core.multiply.product import Product
from lora_rt.core.multiply.ways import computes_in, dense_weight, is_4bit

Weight = Callable[[], Tensor]
"""Gives a layer's weight (out, in) for one product, in the dtype that the product is made in."""


def fuse(model: nn.Module, gated: Callable[[], bool]) -> int:
    """Let the adapted layers of a model on a CPU be multiplied that way; how many of them there are.

    Left as they are: layers with more than a plain LoRA, and those whose product is not that of a dense weight (int8).

    Args:
        model: a PeftModel with one adapter, "default".
        gated: whether a gate stands on the rank axis now, which PEFT's own way has to see.
    """
    layers = [m for m in model.modules() if isinstance(m, LoraLayer) and _is_plain(m)]
    order = _Order()
    for layer in layers:
        base = layer.get_base_layer()
        if is_4bit(base) and base.bias is not None:  # as bitsandbytes does in its own first forward pass
            base.bias.data = base.bias.data.to(_dtype(base))
        layer.forward = _Forward(layer, gated, order)
    return len(layers)


def _is_plain(layer: Any) -> bool:
    a, b = layer.lora_A, layer.lora_B
    if list(a) != ["default"] or list(b) != ["default"] or layer.lora_variant or layer.merged:
        return False
    factors = (a["default"], b["default"])
    if not all(type(f) is nn.Linear and f.bias is None for f in factors):
        return False
    floats = all(f.weight.dtype == torch.float32 and f.weight.is_cpu for f in factors)
    return floats and _dtype(layer.get_base_layer()) is not None


def _dtype(base: nn.Module) -> torch.dtype | None:
    """The dtype that a layer's dense weight is multiplied in; None for layers that have none of the kind."""
    if "forward" in vars(base) and not isinstance(vars(base)["forward"], Product):
        return None
    if type(base) is nn.Linear and base.weight.dtype == torch.float32:
        return torch.float32
    return computes_in(base)


class _Order:
    """Which layers read one input behind one another, as passes without gradients have shown, and what waits for them.

    Such a pass goes before every step: that which tries whether rows can be packed, or an evaluation. Learned in a step
    itself it would let a block that is run again for its gradients do something else than before.
    """

    def __init__(self) -> None:
        self._input: Callable[[], Tensor | None] = lambda: None
        self._version = 0
        self._first: _Forward | None = None
        self._made: dict[_Forward, Tensor] = {}

    def seen(self, layer: _Forward, x: Tensor) -> None:
        """A layer reads x in a pass without gradients."""
        if self._first is not None and self._input() is x:
            self._first.followers.append(layer)
        else:
            self._first, self._input = layer, weakref.ref(x)
            layer.followers = []

    def keep(self, x: Tensor, made: dict[_Forward, Tensor]) -> None:
        """What the first layer has made for those behind it, of this x."""
        self._input, self._version, self._made = weakref.ref(x), x._version, made

    def take(self, layer: _Forward, x: Tensor) -> Tensor | None:
        """What was made for a layer, if it was made of this x."""
        return self._made.pop(layer, None) if self._input() is x and self._version == x._version else None


class _Forward:
    """The forward of one adapted layer; PEFT's own where it is gated, or given something else than it computes in."""

    def __init__(self, layer: Any, gated: Callable[[], bool], order: _Order) -> None:
        self._layer = layer
        self._own = layer.forward
        self._gated = gated
        self._order = order
        self._base = layer.get_base_layer()
        self._dropout = layer.lora_dropout["default"]
        self.followers: list[_Forward] = []

    def __call__(self, x: Tensor, *further: Any, **options: Any) -> Tensor:
        """y (..., out) of x (..., in)."""
        if further or options or self._gated() or not self._takes(x):
            return self._own(x, *further, **options)  # type: ignore[no-any-return]
        if not torch.is_grad_enabled():
            self._order.seen(self, x)
        elif (made := self._order.take(self, x)) is not None:
            return made
        return self._together(x, [self, *(f for f in self.followers if f._takes(x))])

    def _together(self, x: Tensor, layers: Sequence[_Forward]) -> Tensor:
        if not torch.is_grad_enabled():
            layers = layers[:1]
        factors = [f for layer in layers for f in layer._factors()]
        made = _Fused.apply(x, [layer._part(x) for layer in layers], self._share(), *factors)  # type: ignore[no-untyped-call]
        self._order.keep(x, dict(zip(layers[1:], made[1:], strict=True)))
        return made[0]  # type: ignore[no-any-return]

    def _takes(self, x: Tensor) -> bool:
        layer = self._layer
        plain = not layer.disable_adapters and not layer.merged
        return plain and x.dtype is _dtype(self._base) and x.is_cpu and bool(x.numel())

    def _share(self) -> float:
        return self._dropout.p if isinstance(self._dropout, nn.Dropout) and self._layer.training else 0.0

    def _factors(self) -> tuple[Tensor, Tensor]:
        return self._layer.lora_A["default"].weight, self._layer.lora_B["default"].weight

    def _part(self, x: Tensor) -> _Part:
        product = vars(self._base).get("forward")
        if isinstance(product, Product):
            weight: Weight = partial(product.weight, product.way(x))
        else:
            weight = partial(dense_weight, self._base)
        return _Part(weight, self._base.bias, self._layer.scaling["default"])


@dataclass(frozen=True, slots=True)
class _Part:
    """One of the layers that read an input: its weight, its bias (out,) and its adapter's scale."""

    weight: Weight
    bias: Tensor | None
    scale: float

    def of(self, x: Tensor, wide: Tensor) -> Tensor:
        """The layer's own product (..., out) in float32, of x (..., in) as it came and in float32."""
        w = self.weight()
        bias = None if self.bias is None else self.bias.to(w.dtype)
        return linear(wide if w.dtype == torch.float32 else x, w, bias).float().contiguous()


def _kept(like: Tensor, share: float) -> tuple[Tensor | None, float]:
    """Which places dropout leaves, drawn by 16 bits each, and what scales the rest up; (None, 1) without dropout.

    torch's own draw takes four times as long, which is a thirtieth of a step with the document's settings.
    """
    steps = min(round(share * 2**16), 2**16 - 1)
    if not steps:
        return None, 1.0
    drawn = torch.empty(-(-like.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = drawn.view(torch.int16)[: like.numel()] >= steps - 2**15
    return kept.view_as(like), 2**16 / (2**16 - steps)


class _Fused(torch.autograd.Function):
    """x (..., in) and each y (..., out) in the dtype of the model; for each layer A (r, in) and B (out, r) in float32.

    The ranks of all layers lie side by side: A (R, in), and hidden = A x (tokens, R) has a slice for each layer.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, parts: Sequence[_Part], share: float, *factors: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        a, bs = torch.cat(factors[::2]) if len(parts) > 1 else factors[0], factors[1::2]
        wide = x.float()
        flat = wide.reshape(-1, x.shape[-1])  # (tokens, in)
        kept, more = _kept(flat, share)
        hidden = (flat if kept is None else flat * kept) @ a.T  # (tokens, R)
        scales = [part.scale * more for part in parts]
        found = []
        for part, b, scale, own in zip(parts, bs, scales, _split(hidden, bs), strict=True):
            y = part.of(x, wide)
            y.view(-1, y.shape[-1]).addmm_(own, b.T, alpha=scale)  # (tokens, out)
            # Not as a view, which nobody may write into: Llama 4 does.
            found.append(torch.ops.aten._unsafe_view(y.to(x.dtype), list(y.shape)))
        ctx.save_for_backward(x, kept, hidden, a, *bs)
        ctx.parts, ctx.scales = parts, scales
        return tuple(found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        x, kept, hidden, a, *bs = ctx.saved_tensors
        wide = x.reshape(-1, x.shape[-1]).float()
        to_hidden = hidden.new_zeros(hidden.shape[::-1])  # (R, tokens)
        to_b: list[Tensor | None] = [None] * len(bs)
        to_x: Tensor | None = None  # (tokens, in)
        pieces = zip(ctx.parts, ctx.scales, bs, _split(hidden, bs), _split(to_hidden.T, bs), grads, strict=True)
        for number, (part, scale, b, own, to_own, got) in enumerate(pieces):
            if got is None:
                continue
            given = got.reshape(-1, b.shape[0])
            grad = given.float()  # (tokens, out)
            # Written so that the narrow side comes first: the other way round they take several times as long.
            to_b[number] = (own.T @ grad).mul_(scale).T
            torch.mul(b.T @ grad.T, scale, out=to_own.T)
            if ctx.needs_input_grad[0]:
                w = part.weight()
                one = grad if w.dtype == torch.float32 else given
                if to_x is None:
                    to_x = (one @ w).float()
                elif w.dtype == torch.float32:
                    to_x.addmm_(one, w)
                else:
                    to_x += one @ w
        to_a = _split((to_hidden @ (wide if kept is None else wide * kept)).T, bs)
        if to_x is not None and kept is None:
            to_x.addmm_(to_hidden.T, a)
        elif to_x is not None:
            to_x.addcmul_(to_hidden.T @ a, kept)
        factors = [g for a_grad, b_grad in zip(to_a, to_b, strict=True) for g in (a_grad.T, b_grad)]
        return None if to_x is None else to_x.to(x.dtype).view_as(x), None, None, *factors


def _split(ranks: Tensor, bs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The ranks of each layer, of (..., R)."""
    return ranks.split([b.shape[1] for b in bs], -1)  # type: ignore[no-untyped-call,no-any-return]
