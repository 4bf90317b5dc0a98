"""A layer and its adapter as one product on a CPU, while it trains: y = W x + s B (A x), rounded once.

PEFT lets the layer round its output, casts its input a second time and adds what the adapter gives in passes of their
own; each of them reads and writes (tokens, width) numbers, which together cost about as much as a product. Here input
and gradient are cast once, and the adapter's product is added up where the layer's stands. The mathematics is PEFT's;
in float32 the gradients are its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.functional import linear

from lora_rt.core.base.multiply import Product, computes_in, dense_weight, is_4bit

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
    for layer in layers:
        base = layer.get_base_layer()
        if is_4bit(base) and base.bias is not None:  # as bitsandbytes does in its own first forward pass
            base.bias.data = base.bias.data.to(_dtype(base))
        layer.forward = _Forward(layer, gated)
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


class _Forward:
    """The forward of one adapted layer; PEFT's own where it is gated, or given something else than it computes in."""

    def __init__(self, layer: Any, gated: Callable[[], bool]) -> None:
        self._layer = layer
        self._own = layer.forward
        self._gated = gated
        self._base = layer.get_base_layer()
        self._dropout = layer.lora_dropout["default"]

    def __call__(self, x: Tensor, *further: Any, **options: Any) -> Tensor:
        """y (..., out) of x (..., in)."""
        layer = self._layer
        if further or options or self._gated() or layer.disable_adapters or layer.merged:
            return self._own(x, *further, **options)  # type: ignore[no-any-return]
        if x.dtype is not _dtype(self._base) or not x.is_cpu or not x.numel():
            return self._own(x)  # type: ignore[no-any-return]
        share = self._dropout.p if isinstance(self._dropout, nn.Dropout) and layer.training else 0.0
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        y: Tensor = _Fused.apply(x, a, b, self._weight(x), self._base.bias, layer.scaling["default"], share)  # type: ignore[no-untyped-call]
        return y

    def _weight(self, x: Tensor) -> Weight:
        product = vars(self._base).get("forward")
        if isinstance(product, Product):
            return partial(product.weight, product.way(x))
        return partial(dense_weight, self._base)


class _Fused(torch.autograd.Function):
    """x (..., in) and y (..., out) in the dtype of the model; A (r, in) and B (out, r) in float32."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, a: Tensor, b: Tensor, weight: Weight, bias: Tensor | None, scale: float, share: float
    ) -> Tensor:
        given = x.reshape(-1, x.shape[-1])  # (tokens, in)
        wide, w = given.float(), weight()
        y = linear(wide if w.dtype == torch.float32 else given, w, None if bias is None else bias.to(w.dtype)).float()
        mask = None
        if share > 0:
            wide, mask = torch.native_dropout(wide, share, True)
        hidden = wide @ a.T  # (tokens, r)
        y.addmm_(hidden, b.T, alpha=scale)  # (tokens, out)
        ctx.save_for_backward(x, a, b, hidden, mask)
        ctx.weight, ctx.scale, ctx.share = weight, scale, share
        return y.to(x.dtype).view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        x, a, b, hidden, mask = ctx.saved_tensors
        given = grads[0].reshape(-1, b.shape[0])
        grad = given.float()  # (tokens, out)
        # Written so that the narrow side comes first: the other way round they take several times as long.
        to_b = (hidden.T @ grad).mul_(ctx.scale).T
        to_hidden = (b.T @ grad.T).mul_(ctx.scale).T  # (tokens, r)
        wide = x.reshape(-1, x.shape[-1]).float()
        kept = None if mask is None else mask.float().div_(1 - ctx.share)
        to_a = to_hidden.T @ (wide if kept is None else wide * kept)
        if not ctx.needs_input_grad[0]:
            return None, to_a, to_b, None, None, None, None
        w = ctx.weight()
        to_x = ((grad if w.dtype == torch.float32 else given) @ w).float()  # (tokens, in)
        if kept is None:
            to_x.addmm_(to_hidden, a)
        else:
            to_x.addcmul_(to_hidden @ a, kept)
        return to_x.to(x.dtype).view_as(x), to_a, to_b, None, None, None, None
