"""What compiled loops read and call by addresses: arrays whose memory somebody else keeps, and functions of C."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from lora_rt.core.native.compiled import compiled


@intrinsic  # type: ignore[untyped-decorator]  # numba has no types
def pointer(_context: Any, _address: Any) -> Any:
    """An address as a pointer."""

    def generated(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), generated


@compiled(kept=False)
def floats_at(address: int, count: int) -> Any:
    """So many float32."""
    return carray(pointer(address), count, np.float32)


@compiled(kept=False)
def doubles_at(address: int, count: int) -> Any:
    """So many float64."""
    return carray(pointer(address), count, np.float64)


@compiled(kept=False)
def integers_at(address: int, count: int) -> Any:
    """So many int64."""
    return carray(pointer(address), count, np.int64)


@compiled(kept=False)
def numbers_at(address: int, count: int, like: Any) -> Any:
    """So many numbers of the dtype of another array."""
    return carray(pointer(address), count, like.dtype)


def _called(result: Any, kinds: Any) -> Any:
    """Calls the C function at an address, which is the first argument."""

    def generated(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        function = builder.inttoptr(arguments[0], ir.FunctionType(result, kinds).as_pointer())
        given = [builder.inttoptr(one, kind) for one, kind in zip(arguments[1:], kinds, strict=True)]
        called = builder.call(function, given)
        return called if isinstance(result, ir.IntType) else ir.Constant(ir.IntType(8).as_pointer(), None)

    return generated


@intrinsic  # type: ignore[untyped-decorator]  # numba has no types
def ask(_context: Any, _address: Any) -> Any:
    """int f(void)"""
    return types.int32(types.int64), _called(ir.IntType(32), [])


@intrinsic  # type: ignore[untyped-decorator]  # numba has no types
def wait(_context: Any, _address: Any) -> Any:
    """void f(void)"""
    return types.voidptr(types.int64), _called(ir.VoidType(), [])


@intrinsic  # type: ignore[untyped-decorator]  # numba has no types
def run_with(_context: Any, _address: Any, _arguments: Any) -> Any:
    """void f(void *)"""
    return types.voidptr(types.int64, types.int64), _called(ir.VoidType(), [ir.IntType(8).as_pointer()])
