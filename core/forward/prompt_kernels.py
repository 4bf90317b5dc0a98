"""What a pass of many tokens does between its products, written in LLVM's terms: each token read and written once.

    normed    x += y, where there is a y, then RMSNorm of x (H,)
    turned    the rope of every head (D,), in place
    gated     gate = silu(gate) * up, (F,), in place

transformers makes some ten operations of each, of which every one reads and writes all tokens, most of them in float32:
of a base of 135 million parameters that is a third of the time of a prompt. Numbers are those of the model, bfloat16 or
float32, and are rounded where transformers rounds them; each token's are made by themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from llvmlite import binding, ir

from lora_rt.core.native import registers
from lora_rt.core.native.machine_code import shared_kernels, taking
from lora_rt.core.native.registers import BF16, F32, I16, I64, Registers, counting

LANES = 16
"""Numbers that are made at a time: widths are multiples of it."""

_USED = [__file__, registers.__file__]


def kernels(narrow: bool) -> tuple[int, int, int]:
    """Where three functions lie, of numbers in bfloat16 or in float32; any number of threads may run each.

    They take nine int64: 0, how many parts of tokens threads take, and
        normed    H, the bits of eps in float32, tokens; x, y or 0, the weight, where the norm is written.
        turned    heads, D, tokens; x, cos and sin (tokens, D), 0.
        gated     F, 0, tokens; gate, up, 0, 0.
    """
    made = {"normed": _normed, "turned": _turned, "gated": _gated}
    parts = {name: partial(_part, name=name, narrow=narrow, made=one) for name, one in made.items()}
    normed, turned, gated = shared_kernels("prompt", parts, 1, uses=_USED, told=f"prompt {narrow} {rounds()}")
    return normed, turned, gated


def rounds() -> bool:
    """Whether the processor rounds to bfloat16 itself; to one that does not LLVM gives a call of what nobody has."""
    return bool(binding.get_host_cpu_features().get("avx512bf16"))


class _Numbers(Registers):
    """Registers of numbers that lie in memory in the model's dtype."""

    def __init__(self, builder: Any, narrow: bool) -> None:
        super().__init__(builder, LANES)
        self.size = 2 if narrow else 4
        self._narrow = narrow
        self._bits, self._rounds = ir.VectorType(I16, LANES), rounds()

    def read(self, address: Any) -> Any:
        return self._widened(self.at(address, self._bits)) if self._narrow else self.at(address, self.floats)

    def rounded(self, value: Any) -> Any:
        return self._widened(self._narrowed(value)) if self._narrow else value

    def write(self, value: Any, address: Any) -> None:
        self.put(self._narrowed(value) if self._narrow else value, address)

    def _widened(self, bits: Any) -> Any:
        b = self.builder
        return b.bitcast(b.shl(b.zext(bits, self.integers), self.every(16)), self.floats)

    def _narrowed(self, value: Any) -> Any:
        """The bits of bfloat16, half to even; what is no number stays none."""
        b = self.builder
        if self._rounds:
            return b.bitcast(b.fptrunc(value, ir.VectorType(BF16, LANES)), self._bits)
        bits = b.bitcast(value, self.integers)
        odd = b.and_(b.lshr(bits, self.every(16)), self.every(1))
        nearest = b.lshr(b.add(b.add(bits, self.every(0x7FFF)), odd), self.every(16))
        nothing = b.or_(b.lshr(bits, self.every(16)), self.every(0x40))
        return b.trunc(b.select(b.fcmp_ordered("ord", value, value), nearest, nothing), self._bits)

    @contextmanager
    def each(self, width: Any, *addresses: Any) -> Iterator[list[Any]]:
        """A loop over so many numbers: where the next register of each array begins."""
        b = self.builder
        with counting(b, I64(0), width, LANES) as number:
            offset = b.mul(number, I64(self.size))
            yield [b.add(address, offset) for address in addresses]


def _part(module: Any, name: str, narrow: bool, made: Callable[..., None]) -> Any:
    """A function that does something with each of a part of the tokens."""
    function, b, (start, stop, *given) = taking(module, f"part_of_{name}")
    with counting(b, start, stop, 1) as token:
        made(_Numbers(b, narrow), token, *given)
    b.ret_void()
    return function


def _normed(r: _Numbers, token: Any, width: Any, eps: Any, _tokens: Any, x: Any, y: Any, weight: Any, out: Any) -> None:
    b = r.builder
    offset = b.mul(token, b.mul(width, I64(r.size)))
    x, out = b.add(x, offset), b.add(out, offset)
    with b.if_then(b.icmp_signed("!=", y, I64(0))), r.each(width, x, b.add(y, offset)) as (x_at, y_at):
        r.write(b.fadd(r.read(x_at), r.read(y_at)), x_at)
    sums = [r.zeros()]
    with counting(b, I64(0), b.sdiv(width, I64(LANES)), 1, sums) as number:
        found = r.read(b.add(x, b.mul(number, I64(LANES * r.size))))
        sums[0] = r.times(found, found, sums[0])
    mean = b.fdiv(r.total(sums[0]), b.sitofp(width, F32))
    root = r.call("llvm.sqrt.f32", F32, b.fadd(mean, b.bitcast(b.trunc(eps, ir.IntType(32)), F32)))
    scale = r.spread(b.fdiv(F32(1.0), root))
    with r.each(width, x, weight, out) as (x_at, weight_at, out_at):
        r.write(b.fmul(r.rounded(b.fmul(r.read(x_at), scale)), r.read(weight_at)), out_at)


def _turned(r: _Numbers, token: Any, heads: Any, size: Any, _tokens: Any, x: Any, cos: Any, sin: Any, _: Any) -> None:
    b = r.builder
    of_head = b.mul(size, I64(r.size))
    half = b.sdiv(of_head, I64(2))
    of_token = b.mul(token, of_head)
    cos, sin = b.add(cos, of_token), b.add(sin, of_token)
    with counting(b, I64(0), heads, 1) as head:
        first = b.add(x, b.mul(b.add(b.mul(token, heads), head), of_head))
        with r.each(b.sdiv(size, I64(2)), first, cos, sin) as (low, cos_at, sin_at):
            high = b.add(low, half)
            one, other = r.read(low), r.read(high)
            one_turned, other_turned = (
                b.fadd(
                    r.rounded(b.fmul(own, r.read(b.add(cos_at, at)))),
                    r.rounded(b.fmul(beside, r.read(b.add(sin_at, at)))),
                )
                for own, beside, at in ((one, b.fneg(other), I64(0)), (other, one, half))
            )
            r.write(one_turned, low)
            r.write(other_turned, high)


def _gated(r: _Numbers, token: Any, width: Any, _: Any, _tokens: Any, gate: Any, up: Any, _a: Any, _b: Any) -> None:
    b = r.builder
    offset = b.mul(token, b.mul(width, I64(r.size)))
    with r.each(width, b.add(gate, offset), b.add(up, offset)) as (gate_at, up_at):
        a = r.read(gate_at)
        share = b.fdiv(a, b.fadd(r.spread(F32(1.0)), r.exp(b.fneg(a))))
        r.write(b.fmul(r.rounded(share), r.read(up_at)), gate_at)
