"""A product of float32 rows and a 4-bit weight (bitsandbytes' NF4) that is never made dense.

Of a weight that is kept in half a byte a number, a processor reads a quarter of what it reads in float16, and with few
rows that is what a product waits for. A block of 64 numbers has one scale. Its sixteen levels times that scale, rounded
as bitsandbytes rounds them, fit into one register (two on processors without AVX-512), and each number is looked up
there: so what is multiplied are the very numbers of the dense weight, and only the order of the sum is another. Many
rows meet them where a thread has written them into its own caches (`vector_kernel.py`).

On a processor with AMX numbers that are all bfloat16's are multiplied by its tiles (`amx_kernel.py`), which sum up in
float32 as well: sixteen rows in hardly more than the time of one, and a row has the same bits whatever stands beside
it.

    codes    (out, in / 2) bytes: of a block, byte by byte, V numbers in the lower halves and the V next in the upper
    scales   (out, in / 64) float32                                  V: numbers in a register, 16 or 8
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from functools import cache, partial, wraps
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lora_rt.core.native import openmp

_log = logging.getLogger("lora_rt.base")

BLOCK = 64  # numbers with one scale
TILE = 4  # outputs, of which the kernel makes whole ones
WIDEST = 1 << 15  # inputs that are multiplied by tiles: a copy of sixteen rows stands on each thread's stack, 1 MiB
ALONE = 1 << 16  # numbers times rows up to which one thread is faster than two
_DTYPES = (torch.bfloat16, torch.float32)
_Arguments = ctypes.c_int64 * 9


class FourBit(NamedTuple):
    """A weight (out, in), and the dtype to which its numbers are rounded."""

    codes: Tensor
    scales: Tensor
    dtype: torch.dtype


def nbytes_of(out: int, width: int) -> int:
    """The memory of a weight."""
    return out * width // 2 + out * width // BLOCK * 4


class Trial(Protocol):
    """Whether something is there; found out once for each way to ask."""

    def __call__(self, *given: Any, **named: Any) -> bool: ...

    def cache_clear(self) -> None:
        """Find out anew."""


def proven(told: str) -> Callable[[Callable[..., bool]], Trial]:
    """Decorates the trial of a kernel, which is made once for each way to ask: where it ends in an error, it says no.

    Args:
        told: what there is not; each argument that is given by its place has one in it.
    """

    def decorate(trial: Callable[..., bool]) -> Trial:
        @wraps(trial)
        def found(*given: Any, **named: Any) -> bool:
            try:
                with torch.device("cpu"):  # whatever device the program makes its tensors on
                    return trial(*given, **named)
            except Exception as error:  # another release of llvmlite may refuse it in any way; others multiply as well
                _log.info(f"{told} here: %s", *given, error)
                return False

        return cache(found)

    return decorate


@proven("no kernel for 4-bit weights")
def are_there() -> bool:
    """Whether this processor has what the kernel needs, and llvmlite compiles it to what it should be."""
    if not could_be():
        return False
    codes = torch.arange(BLOCK * TILE, dtype=torch.uint8).view(TILE, BLOCK) % 16
    scales = torch.ones(TILE, 1, dtype=torch.float32)
    ones = product(torch.eye(BLOCK, dtype=torch.float32), from_codes(codes, scales, torch.bfloat16)).T == 1
    return torch.equal(ones, codes == 15)


def could_be() -> bool:
    """The same before anything is compiled."""
    return _lanes() > 0


def fits(module: Any) -> bool:
    """Whether a 4-bit layer, not yet packed by bitsandbytes, is laid out as the kernel reads it."""
    state = getattr(module.weight, "quant_state", None)
    if state is None or getattr(state, "packing_format_for_cpu", False) or not are_there():
        return False
    return state.quant_type == "nf4" and state.blocksize == BLOCK and could_fit(module)


def could_fit(module: Any) -> bool:
    """The same of a layer of bitsandbytes' usual blocks that has no weight yet."""
    whole = not module.in_features % BLOCK and not module.out_features % TILE
    return module.compute_dtype in _DTYPES and whole


def laid_out(module: Any) -> FourBit:
    """The weight of a layer that `fits`."""
    state, out, width = module.weight.quant_state, module.out_features, module.in_features
    scales = state.absmax
    if state.nested:
        from bitsandbytes.functional import dequantize_blockwise

        scales = dequantize_blockwise(state.absmax, state.state2) + state.offset
    bytes_ = module.weight.data.view(-1).view(torch.uint8)
    codes = torch.stack([bytes_ >> 4, bytes_ & 15], dim=1)  # the first of two numbers lies in the upper half
    if scales.numel() * BLOCK != out * width:
        raise ValueError(f"{scales.numel()} scales for {out} x {width} numbers")
    return from_codes(codes.view(out, width), scales.float().view(out, -1).clone(), module.compute_dtype)


def from_codes(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> FourBit:
    """A weight of codes 0 to 15, (out, in) uint8, and scales (out, in / 64)."""
    out, width = codes.shape
    halves = codes.view(out, width // (2 * _lanes()), 2, _lanes())
    return FourBit((halves[:, :, 0] | halves[:, :, 1] << 4).view(out, width // 2), scales, dtype)


def could_be_tiles() -> bool:
    """Whether this processor has tiles and this process may use them; nothing is compiled."""
    from lora_rt.core.native import amx

    return amx.are_there()


@proven("no tiles for 4-bit weights")
def have_tiles() -> bool:
    """Whether weights in bfloat16 are multiplied by tiles here, and these give what they should.

    Tiles read codes as they lie for registers of sixteen numbers.
    """
    if not (could_be_tiles() and _lanes() == 16 and are_there()):
        return False
    x, codes = torch.eye(2 * BLOCK, dtype=torch.float32), torch.arange(BLOCK * 40, dtype=torch.int64)
    weight = from_codes(
        (codes % 16).to(torch.uint8).view(20, -1), torch.ones(20, 2, dtype=torch.float32), torch.bfloat16
    )
    found = by_threads(_run_tiles, x, weight.codes, weight.scales)
    return torch.equal(found, by_threads(_run(torch.bfloat16), x, weight.codes, weight.scales))


def product(x: Tensor, weight: FourBit, bias: Tensor | None = None, *, narrow: bool = False) -> Tensor:
    """y (..., out) of a float32 x (..., in), a weight and a float32 bias (out,). It knows no gradients.

    The order of the sums hangs on whether there are more than two rows; by tiles it does not.

    Args:
        narrow: the numbers of x are all bfloat16's, so that tiles may be taken where the weight's are, too.

    Raises:
        ValueError: x has another dtype, width or device; the kernel would read what is not there.
    """
    width, dtype = x.shape[-1], weight.dtype
    out, half = weight.codes.shape
    if x.dtype is not torch.float32 or width != 2 * half or not x.is_cpu:
        raise ValueError(f"{tuple(x.shape)} in {x.dtype} on {x.device} for a 4-bit weight of {out} x {2 * half}")
    by_tiles = narrow and dtype is torch.bfloat16 and width <= WIDEST and have_tiles()
    return by_threads(_run_tiles if by_tiles else _run(dtype), x, weight.codes, weight.scales, bias)


def by_threads(
    run: Callable[[Any, int], None],
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    alone: int = ALONE,
    apiece: int = 2,
) -> Tensor:
    """y (..., out), float32, of x (..., in), a weight of `out` rows that lies as a kernel reads it, and a bias (out,).

    Args:
        run: runs the kernel on nine int64 by so many threads: 0, parts, rows, in, out, weight, its scales or 0, x, y.
        alone: numbers of the weight times rows up to which one thread is faster.
        apiece: parts of the outputs for each thread.
    """
    *rows, width = x.shape
    x, out, count = x.contiguous(), len(weight), x.numel() // width
    y = x.new_empty(*rows, out, dtype=torch.float32)
    threads = torch.get_num_threads() if count * out * width > alone else 1
    parts = apiece * threads if threads > 1 else 1
    places = weight.data_ptr(), 0 if scales is None else scales.data_ptr(), x.data_ptr(), y.data_ptr()
    run(_Arguments(0, parts, count, width, out, *places), threads)
    return y if bias is None else y.add_(bias)


def kernel_of(dtype: torch.dtype, *, widest: int | None = None) -> tuple[int, ...]:
    """Where the two functions of the kernel lie, for weights whose numbers are rounded to this dtype.

    Args:
        widest: the most inputs that these have, where all that they are multiplied with is rounded as well.
    """
    rounded = dtype is torch.bfloat16
    return _kernel(_lanes(), rounded, rounded and widest is not None and widest <= WIDEST and have_tiles())


def in_a_register() -> int:
    """How many float32 a register holds for loops that look nothing up: 16 or 8."""
    return _lanes() or 8


@cache
def _run(dtype: torch.dtype) -> Callable[[Any, int], None]:
    """Runs the kernel on its arguments by so many threads."""
    return partial(openmp.run, _parallel(), kernel_of(dtype)[0])


def _run_tiles(arguments: Any, threads: int) -> None:
    openmp.run(_parallel(), _kernel(16, True, True)[0], arguments, threads)


def _kernel(lanes: int, rounded: bool, tiles: bool) -> tuple[int, ...]:
    from lora_rt.core.multiply.four_bit_kernel import kernel  # compiled when it is asked for

    return kernel(lanes, rounded, tiles)


def _parallel() -> openmp.Team | None:
    return openmp.team()


@cache
def _lanes() -> int:
    """How many float32 a register holds in which sixteen levels can be looked up; 0 for none."""
    try:
        from llvmlite.binding import get_host_cpu_features

        features = get_host_cpu_features()
    except (OSError, RuntimeError):
        return 0
    if features.get("avx512f"):
        return 16
    return 8 if features.get("avx2") and features.get("fma") else 0
