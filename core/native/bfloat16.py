"""bfloat16 in loops that numba compiles: numpy has none, so that its bits stand in a uint16.

What is rounded is rounded half to even; a float32 stays as it is.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

_BITS = np.uint32(16)
_HALF, _ONE, _NAN = np.uint32(0x7FFF), np.uint32(1), np.uint16(0x7FC0)


def widened(number: Any) -> Any:
    """A number of the model as float32."""


def narrowed(number: Any, like: Any) -> Any:
    """A float32 as a number of the model, of which an array is given."""


def rounded(number: Any, like: Any) -> Any:
    """A float32 with the bits that it keeps in the model's dtype."""


@overload(widened, strict=False)  # type: ignore[untyped-decorator]  # numba has no types
def _widened_of(number: Any) -> Any:
    if number == types.uint16:
        return lambda number: np.uint32(np.uint32(number) << _BITS).view(np.float32)
    return lambda number: number


@overload(narrowed, strict=False)  # type: ignore[untyped-decorator]  # numba has no types
def _narrowed_of(number: Any, like: Any) -> Any:
    if like.dtype == types.uint16:

        def narrow(number: Any, like: Any) -> Any:
            bits = np.float32(number).view(np.uint32)
            near = np.uint16((bits + _HALF + ((bits >> _BITS) & _ONE)) >> _BITS)
            return near if number == number else _NAN

        return narrow
    return lambda number, like: number


@overload(rounded, strict=False)  # type: ignore[untyped-decorator]  # numba has no types
def _rounded_of(number: Any, like: Any) -> Any:
    if like.dtype == types.uint16:
        return lambda number, like: widened(narrowed(number, like))
    return lambda number, like: number
