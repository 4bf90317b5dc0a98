"""Calls bitsandbytes' 4-bit CPU kernel without the layers of Python around it.

For one row, a 4-bit layer of a small model takes 9 to 17 microseconds in the kernel and 40 more on the way there
(checks, casts, the dispatcher, two operators written in Python). The kernel, its arguments and its result are the same,
which is verified layer by layer; a layer that differs in anything keeps its own forward.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_KERNEL = "gemv_4bit_inference_cpu_nf4_bf16"
_NOWHERE = -1

Forward = Callable[[Tensor], Tensor]


def direct_forward(module: nn.Module) -> Forward:
    """The layer's forward, by the short way where there is one, else its own.

    To be called after the layer's first forward pass in eval mode, in which bitsandbytes packs its weight.
    """
    own: Forward = module.forward
    state: Any = getattr(getattr(module, "weight", None), "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False) or module.training:
        return own
    short = _short(module, state, own)
    return short if short is not None and _same(short, own, int(state.shape[1])) else own


def _short(module: Any, state: Any, own: Forward) -> Forward | None:
    """One call of the kernel: out (rows, N) = x (rows, K) times the packed weight."""
    kernel = _kernel()
    plain = module.bias is None and state.quant_type == "nf4" and not state.nested
    if kernel is None or not plain or not module.compute_dtype == state.absmax.dtype == torch.bfloat16:
        return None
    parameters, features, width = module._parameters, int(state.shape[0]), int(state.shape[1])
    n, k, block = (ctypes.c_int64(int(number)) for number in (*state.shape, state.blocksize))
    packed = _Packed.of(module.weight)
    integer, pointer, wanted = ctypes.c_int64, ctypes.c_void_p, torch.bfloat16

    def forward(x: Tensor) -> Tensor:
        nonlocal packed
        now, weight = packed, parameters["weight"]  # `now` keeps the memory that the kernel reads
        *rows, inputs = x.shape
        fits = x.dtype is wanted and x.is_cpu and inputs == width and x.is_contiguous() and not x.requires_grad
        if not fits or not x.numel():
            return own(x)
        if weight is not now.weight or place_of(weight)[0] != now.address:
            y = own(x)  # which packs the weight again, where it was unpacked
            packed = _Packed.of(weight)
            return y
        out = x.new_empty(*rows, features)
        count = integer(x.numel() // width)
        kernel(count, n, k, pointer(x.data_ptr()), now.b, now.scales, pointer(out.data_ptr()), block, k, n)
        return out

    return forward


def place_of(weight: Tensor) -> tuple[int, int]:
    """Where a weight's numbers lie, and how often they were changed in place.

    Asked past bitsandbytes' weights, which answer through Python: 5 us a question, beside products of some ten.
    """
    with torch._C.DisableTorchFunctionSubclass():
        return weight.data_ptr(), weight._version


@dataclass(frozen=True, slots=True)
class _Packed:
    """Where a packed weight and its scales lie. They are kept alive: their addresses can't come to be anything else's.

    A state dict that is asked for, or a model that is moved, puts other tensors in their place.
    """

    weight: Any
    address: int
    b: ctypes.c_void_p
    scales: ctypes.c_void_p
    held: tuple[Tensor, Tensor]

    @classmethod
    def of(cls, weight: Any) -> _Packed:
        state = weight.quant_state
        packed = weight.is_cpu and getattr(state, "packing_format_for_cpu", False)
        address = weight.data_ptr() if packed else _NOWHERE
        held = weight.data, state.absmax
        return cls(weight, address, ctypes.c_void_p(address), ctypes.c_void_p(state.absmax.data_ptr()), held)


def _kernel() -> Callable[..., None] | None:
    """The function in bitsandbytes' CPU library, or None where this build has none."""
    from bitsandbytes.cextension import lib

    library = getattr(lib, "_lib", None)  # its wrapper has an attribute for every name, and fails when that is called
    return getattr(library, _KERNEL, None) if isinstance(library, ctypes.CDLL) else None


def _same(short: Forward, own: Forward, inputs: int) -> bool:
    """Whether both ways give the same bits, for one row and for several."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for rows in (1, 3):
            x = torch.randn(1, rows, inputs, generator=generator).bfloat16()
            if not torch.equal(short(x), own(x)):
                return False
    return True
