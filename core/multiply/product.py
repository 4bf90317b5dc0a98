"""The forward of one layer whose product is made in the fastest ways (`ways.py`), and the copies that it keeps."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lora_rt.core.base.repacking import forbid_repacking
from lora_rt.core.multiply import as_it_lies, blocked, four_bit, half, many, tiled
from lora_rt.core.multiply.cpu_4bit import Forward, place_of
from lora_rt.core.multiply.ways import (
    NARROW,
    Copy,
    Way,
    computes_in,
    dense_weight,
    keeps,
    laid_out,
    packed_forward,
    packs,
    widened_product,
)

_CLASSES = (0, 0, 1, 2, 3, 4, 4, 5)  # of `SIZES`, by the bits of the number of tokens
_MANY = len(_CLASSES) - 1
_PACKERS = 4  # threads that make copies at once, each of which holds its weight in float32 meanwhile
_GIVEN = (*NARROW, "tiles")  # ways that take x as it is
_BY_MANY = "four-bit", "tiles"
"""Ways that read a weight in 4 bits or in bfloat16 where it lies, of many rows by another kernel."""
_READ: dict[Way, Copy] = {"dense": "narrow", "dense-wide": "wide"}
"""Ways whose copy any product can read."""
_ANY = (-1, -1)
_FLOAT32 = torch.empty(0, dtype=torch.float32)

_LOOKING: ContextVar[bool] = ContextVar("looking", default=False)


@contextmanager
def looking() -> Iterator[None]:
    """Within it no dense copies are made: for passes that only show the shapes of what layers get.

    A copy of an output head takes one and a half seconds, and who speaks one token at a time may never need it. Codes
    for the 4-bit kernel are there sooner than bitsandbytes makes a weight dense for a product.
    """
    before = _LOOKING.set(True)
    try:
        yield
    finally:
        _LOOKING.reset(before)


class Product:
    """The forward of one layer, each number of tokens in its way.

    Dense copies are made again when the weight is replaced, moved or changed in place; only a change through `.data`,
    which torch does not count, goes unseen.
    """

    __slots__ = (
        "_by_bits",
        "_four_bit",
        "_kept",
        "_out",
        "_parameters",
        "_place",
        "_weight",
        "beside",
        "dtype",
        "module",
        "own",
        "width",
    )

    def __init__(self, module: nn.Linear, ways: Sequence[Way], near: Collection[int] = ()) -> None:
        """To be made before the layer's first forward pass, which packs its weight on some processors.

        A dense copy is made when it is first needed, or by `keep`; from a weight that is to be packed at once.

        Args:
            ways: one per class of `SIZES`.
            near: classes for which the 4-bit kernel is hardly slower than the way that is taken.
        """
        dtype = computes_in(module)
        assert dtype is not None
        self.module = module
        self.dtype: torch.dtype = dtype
        self.width = module.in_features
        self._out = module.out_features
        self._parameters = module._parameters
        self._by_bits = tuple(ways[number] for number in _CLASSES)
        self._four_bit = tuple(ways[number] == "four-bit" or number in near for number in _CLASSES)
        self._kept: dict[Copy, Any] = {}
        self.beside: Sequence[Product] = ()  # of the same stack of blocks: what one needs, all need
        self._look()
        self.own: Forward = module.forward
        if packs(module):
            if "packed" in ways:
                self.keep()
                self.own = packed_forward(module, dtype)
                self._place = _ANY  # a state dict lays it out anew, and its numbers stay
            else:
                forbid_repacking(module)

    def __call__(self, x: Tensor) -> Tensor:
        """y (..., out) of x (..., in)."""
        if self._is_by_many(x, way := self.way(x)):
            return many.product(x, self._for_many(way), self._parameters.get("bias"))
        return self.unrounded(x, Tensor.to).to(x.dtype)

    def unrounded(self, x: Tensor, widened: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """y as it is made: where that is done in float32, before it is rounded to the dtype of x.

        Args:
            widened: casts x to the dtype of another tensor; several layers that read one x may share what it gives.
        """
        way = self.way(x)
        if way == "packed":
            return self.own(x)
        if self._is_by_many(x, way):
            return many.product(x, self._for_many(way), self._parameters.get("bias"), wide=True)
        return self._made(x if way in _GIVEN else widened(x, _FLOAT32), way)

    def can_add(self, x: Tensor) -> bool:
        """Whether the product with x may be one `with_added`."""
        return self._is_by_many(x, self.way(x))

    def with_added(self, x: Tensor, added: many.Added) -> Tensor:
        """y, and what adapters add to it, rounded once to the dtype of x, where it `can_add`."""
        return many.product(x, self._for_many(self.way(x)), self._parameters.get("bias"), added)

    def _is_by_many(self, x: Tensor, way: Way) -> bool:
        """Whether AMX takes all rows of x as they are, and nobody wants a gradient."""
        if torch.is_grad_enabled() and (
            x.requires_grad or getattr(self._parameters.get("bias"), "requires_grad", False)
        ):
            return False
        return way in _BY_MANY and many.takes(x, self._out, dense=way == "tiles")

    def _for_many(self, way: Way) -> four_bit.FourBit | Tensor:
        return self._copy("four-bit") if way == "four-bit" else self._parameters["weight"]  # type: ignore[return-value]

    def _made(self, given: Tensor, way: Way) -> Tensor:
        """The product with an x in the dtype of the product."""
        product = given.dtype
        bias: Tensor | None = self._parameters.get("bias")
        if bias is not None:
            bias = bias.to(product)
        if given.requires_grad and torch.is_grad_enabled() and way not in _READ:
            y: Tensor = _Remade.apply(given, self, way)  # type: ignore[no-untyped-call]
            return y if bias is None else y + bias
        return self.times(given, way, bias)

    def times(self, given: Tensor, way: Way, bias: Tensor | None = None) -> Tensor:
        """The product with an x in the dtype of the product, without gradients where the weight is made for it."""
        if way == "dense-blocked":
            return blocked.product(given, self._copy("blocked"), bias)
        if way == "dense-half":
            if "half" not in self._kept:
                self._all_in_half(given.numel() // self.width)
            return half.product(given, self._copy("half"), bias)
        if way == "four-bit":
            return four_bit.product(given, self._copy("four-bit"), bias, narrow=self.dtype is torch.bfloat16)
        if way == "tiles":
            return tiled.product(given, self._parameters["weight"], bias)  # type: ignore[arg-type]  # a tensor
        if way == "as-it-lies":
            return as_it_lies.product(given, self._parameters["weight"], bias)  # type: ignore[arg-type]  # a tensor
        if way in _READ:
            return linear(given, self._copy(_READ[way]), bias)
        return widened_product(given, self._narrow(), bias)

    def way(self, x: Tensor) -> Way:
        """How the product with x is made."""
        count = x.numel() // self.width
        way = self._by_bits[min(count.bit_length(), _MANY)]
        if _LOOKING.get() and keeps(way) not in (None, "four-bit", *self._kept):
            return "packed"
        if way == "packed" or x.dtype is not self.dtype or x.shape[-1] != self.width or not x.is_cpu or not count:
            return "packed"
        if way == "tiles" and x.requires_grad and torch.is_grad_enabled():
            return "packed"
        return "packed" if self._changed() and not self._renewed() else way

    def four_bit(self) -> four_bit.FourBit | None:
        """The weight as the 4-bit kernel reads it; None where no number of tokens is multiplied by that."""
        if "four-bit" not in self._by_bits or (self._changed() and not self._renewed()):
            return None
        return self._copy("four-bit")  # type: ignore[no-any-return]

    def is_near(self, rows: int) -> bool:
        """Whether a step of so many rows in one call may read that."""
        return self._four_bit[min(rows.bit_length(), _MANY)]

    def weight(self, way: Way) -> Tensor:
        """The dense weight (out, in) in the dtype of the products that are made in this way."""
        dtype = self.dtype if way == "packed" or way in NARROW else torch.float32
        return self._copy(_READ[way]) if way in _READ else self.made(dtype)

    def made(self, dtype: torch.dtype) -> Tensor:
        """The dense weight (out, in), made for one product."""
        return self._narrow().to(dtype)

    def _narrow(self) -> Tensor:
        widened = "dense-widened" in self._by_bits
        return self._copy("narrow") if widened else dense_weight(self.module)

    def keep(self) -> None:
        """Make the dense copies now."""
        with half.quiet():
            for way in self._by_bits:
                if (kept := keeps(way)) is not None:
                    self._copy(kept)

    def _copy(self, kind: Copy) -> Any:
        """A copy that is kept: an ordinary tensor, so that passes with gradients can use it too, or what `half` or
        `four_bit` has made of it.

        Two threads that need it at once make it twice, of the same numbers.
        """
        kept = self._kept  # another thread that finds another weight begins anew, and is not to get this one's
        found = kept.get(kind)
        if found is None:
            with torch.inference_mode(False), torch.no_grad():
                if kind == "four-bit":
                    found = kept[kind] = four_bit.laid_out(self.module)
                    return found
                other = kept.get("narrow", kept.get("wide"))  # float32 or not, its numbers are the layer's
                found = dense_weight(self.module) if other is None else other
                found = kept[kind] = laid_out(found, kind, self.dtype)
        return found

    def _all_in_half(self, count: int) -> None:
        """Make this layer's copy, and those of the layers beside it that multiply so many tokens in the same way.

        Each takes one thread some milliseconds, and a base has hundreds.
        """
        bits = min(count.bit_length(), _MANY)
        others = [one for one in self.beside if one is not self and one._by_bits[bits] == "dense-half"]
        lacking = [self, *(one for one in others if "half" not in one._kept and not one._changed())]
        with half.quiet(), ThreadPoolExecutor(min(torch.get_num_threads(), _PACKERS)) as threads:
            list(threads.map(lambda one: one._copy("half"), lacking))

    def _look(self) -> None:
        weight: Any = self._parameters["weight"]
        self._weight, self._place = weight, place_of(weight)

    def _changed(self) -> bool:
        """Whether the weight is another one than when it was last looked at."""
        weight: Any = self._parameters["weight"]
        return weight is not self._weight or (self._place != _ANY and place_of(weight) != self._place)

    def _renewed(self) -> bool:
        """Another weight stands in the layer: its copies are made again, where it still is one that can be copied."""
        if computes_in(self.module) is not self.dtype:
            return False
        if "four-bit" in self._by_bits and not four_bit.fits(self.module):
            return False
        if "tiles" in self._by_bits and not tiled.fits(self.module.weight):
            return False
        if "as-it-lies" in self._by_bits and not as_it_lies.fits(self.module.weight):
            return False
        self._kept = {}
        self._look()
        return True


class _Remade(torch.autograd.Function):
    """x W^T with a weight that is made for the product and again for the gradient, instead of being kept in between.

    So it is for a copy in blocks, too: these know no gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Product, way: Way) -> Tensor:
        ctx.product, ctx.dtype = product, x.dtype
        y = product.times(x, way)
        return y.clone() if y._is_view() else y  # what adapters add is added in place, which autograd refuses to a view

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        return grads[0] @ ctx.product.made(ctx.dtype), None, None
