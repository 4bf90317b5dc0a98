"""How fast each way of multiplying is here: measured once for a machine and a shape of layers, and remembered.

What is remembered lies in the home, in `multiply.json`: machine -> layer -> way -> microseconds for each class of
`SIZES` tokens. Nothing but speed hangs on it; what can't be read is measured again.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lora_rt.core.base.machine import cpu_name
from lora_rt.core.multiply import as_it_lies, blocked, four_bit, half, many, tiled
from lora_rt.core.multiply.ways import (
    NARROW,
    SIZES,
    Copy,
    Way,
    computes_in,
    dense_weight,
    is_4bit,
    keeps,
    kept_in,
    laid_out,
    packed_forward,
    packs,
    slice_of,
    ways_of,
    widened_product,
)
from lora_rt.registry import home

Times = Mapping[str, Sequence[float | None]]
"""Way -> microseconds per class of `SIZES`, for its least tokens, and for 128 in the last one; None where the way had
fallen far behind with fewer tokens."""

_BEHIND = 3.0  # times the best: not tried again
_GROWS = 1.5  # times what half as many tokens took: units for bfloat16 take their time to lay a weight out
_MANY = 128  # tokens for the last class: prompts have hundreds, and a way that is fast with 64 may not be with these
_RUNS = 3
_POOL = 48 << 20  # bytes
_FILE = "multiply.json"
_LAYER = re.compile(r"\d+ x \d+ ")  # what `layer_name` begins with
_COPIES = 256  # at most, of one weight: of a layer of four features (Gemma 3n has some) a million would fit in the pool

_known: dict[tuple[str, str], Times] = {}  # so that a process goes one way, whatever becomes of the file


def machine_name() -> str:
    """What decides how fast this process multiplies."""
    packages = ("torch", "bitsandbytes", *(["llvmlite"] if four_bit.could_be() else []))
    versions = ", ".join(f"{package} {metadata.version(package)}" for package in packages)
    # "AMX" alone, or nothing, were figures from before many rows had a kernel of their own.
    own = ", AMX tiles" if four_bit.could_be_tiles() else ", registers" if four_bit.could_be() else ""
    units = torch.backends.cpu.get_cpu_capability() + own
    return f"{cpu_name()}, {units}, {torch.get_num_threads()} threads, {versions}"


def layer_name(layer: nn.Linear) -> str:
    """What decides how fast a layer is multiplied: its shape, how it is kept, and what it computes in."""
    weight: Any = layer.weight
    kept = [weight.quant_state.quant_type] if is_4bit(layer) else []
    kept += ["packed"] if packs(layer) else []
    return " ".join([f"{layer.out_features} x {layer.in_features}", *kept, str(computes_in(layer)).split(".")[-1]])


def times_of(layers: Mapping[str, nn.Linear]) -> dict[str, Times]:
    """Layer name -> times; those of layers that are not known yet are measured now, in a second or two."""
    here = machine_name()
    kept = remembered().get(here, {})
    unknown = {}
    for name, layer in layers.items():
        if (here, name) not in _known:
            found = kept.get(name)
            # Whether there is a kernel for four bits is told by the machine's name.
            if found is None or {*found} - {"four-bit"} != {*ways_of(layer)} - {"four-bit"}:
                unknown[name] = layer
            else:
                _known[here, name] = found
    if unknown:
        new = measure(unknown, torch.full((_POOL // 4,), 0.5, dtype=torch.float32))
        _known.update({(here, name): times for name, times in new.items()})
        document = remembered()
        home.remember(_FILE, {**document, here: {**document.get(here, {}), **new}})
    return {name: _known[here, name] for name in layers}


def remembered() -> dict[str, dict[str, Times]]:
    """Machine -> layer -> times, as far as they are such."""
    return {
        machine: {name: times for name, times in layers.items() if _LAYER.match(name) and _sound(times)}
        for machine, layers in home.remembered(_FILE).items()
        if isinstance(layers, dict)
    }


def _sound(times: Any) -> bool:
    """Whether these are times: of ways, one for each class, and known for a single token."""
    return isinstance(times, dict) and all(
        isinstance(row, list)
        and len(row) == len(SIZES)
        and all(item is None or (isinstance(item, int | float) and 0 < item < math.inf) for item in row)
        and row[0] is not None
        for row in times.values()
    )


def measure(layers: Mapping[str, nn.Linear], pool: Tensor) -> dict[str, Times]:
    """Layer name -> the times of all ways of it, as they are beside the other layers of a pass.

    Args:
        pool: (n,) float32. Dense weights are taken from it in turn: in a pass over a model none is in a cache either.
    """
    dtypes = {name: computes_in(layer) for name, layer in layers.items()}
    tokens = (*SIZES[:-1], _MANY)
    times: dict[str, dict[Way, list[float | None]]] = {
        name: {way: [] for way in ways_of(layer)} for name, layer in layers.items()
    }
    dense_grows = not four_bit.could_be_tiles()
    with torch.inference_mode(False), torch.no_grad():
        candidates = {name: _candidates(layer, dtypes[name], pool) for name, layer in layers.items()}  # type: ignore[arg-type]  # known

        def race(number: int) -> dict[str, dict[Way, float]]:
            tried: dict[Way, dict[str, Callable[[], object]]] = {}
            for name, runs in candidates.items():
                x = torch.full((1, tokens[number], layers[name].in_features), 0.5, dtype=dtypes[name])
                for way, run in runs.items():
                    if None not in times[name][way]:
                        tried.setdefault(way, {})[name] = partial(run, x)
            return _race(tried)

        for number in range(len(tokens)):
            for name, found in race(number).items():
                limit = _BEHIND * min(found.values())
                for way, row in times[name].items():
                    spent = found.get(way)
                    # These fall back further where their time grows with the tokens; dense not by AMX and in float32.
                    growing = way == "packed" or (way == "dense" and dense_grows and dtypes[name] != torch.float32)
                    grows = spent is not None and number > 0 and spent > _GROWS * (row[-1] or 0)
                    row.append(None if spent is None or (grows and growing and spent > limit) else spent)
        # Others may hold the processor for as long as all ways of one class take: each has another turn much later.
        for number in range(len(tokens)):
            for name, found in race(number).items():
                for way, spent in found.items():
                    times[name][way][number] = min(spent, times[name][way][number] or spent)
    return {
        name: {str(way): [None if spent is None else round(spent, 1) for spent in row] for way, row in ways.items()}
        for name, ways in times.items()
    }


def _race(candidates: Mapping[Way, Mapping[str, Callable[[], object]]]) -> dict[str, dict[Way, float]]:
    """What -> way -> the least microseconds of some runs.

    The least, for what disturbs only adds: where others hold the processor, most runs may take a hundred times as long.
    All that goes one way does so several times, one after another, as in a pass over a model: what ran before leaves
    the caches, the memory and the threads in a state that another way would not leave.

    Args:
        candidates: way -> what -> a run of it.
    """
    spent: dict[str, dict[Way, list[float]]] = {}
    for way, runs in candidates.items():
        for number in range(_RUNS):
            for what, run in runs.items():
                wall, used = time.perf_counter(), time.process_time()
                run()
                # Where others hold the processor, the clock on the wall says much more than what one thread used.
                took = min(time.perf_counter() - wall, time.process_time() - used) * 1e6
                if number:  # the first run warms up
                    spent.setdefault(what, {}).setdefault(way, []).append(took)
    return {what: {way: min(times) for way, times in ways.items()} for what, ways in spent.items()}


def _candidates(layer: nn.Linear, dtype: torch.dtype, pool: Tensor) -> dict[Way, Callable[[Tensor], Tensor]]:
    """Way -> what the layer does that goes this way."""
    rows = min(layer.out_features, slice_of(layer.in_features))  # of a larger layer, its first outputs
    kinds: set[Copy] = {"narrow", *(copy for way in ways_of(layer) if (copy := keeps(way)))}
    pools = {copy: _Pool(pool, rows, layer.in_features, copy, dtype) for copy in kinds}
    if is_4bit(layer):
        small: Any = _small(layer, rows)
        own: Callable[[Tensor], Tensor] = small.forward
        made: Callable[[], Tensor] = partial(dense_weight, small)
        if packs(small):
            packing = _small(layer, rows)
            own = packed_forward(packing, dtype)
    else:
        own, made = (lambda x: linear(x, pools["narrow"]())), pools["narrow"]

    def run(way: Way) -> Callable[[Tensor], Tensor]:
        product = dtype if way in NARROW else torch.float32
        kept = keeps(way)
        if kept == "blocked":
            return lambda x: blocked.product(x.float(), pools["blocked"]()).to(x.dtype)
        if kept == "half":
            return lambda x: half.product(x.float(), pools["half"]()).to(x.dtype)
        if kept == "four-bit":
            return partial(_in_four_bits, pools["four-bit"], rows)
        if way == "as-it-lies":
            return lambda x: as_it_lies.product(x.float(), pools["narrow"]()).to(x.dtype)
        if way == "tiles":
            return lambda x: (
                (many if many.takes(x, rows, dense=True) else tiled).product(x, pools["narrow"]()).to(x.dtype)
            )
        weight = made if kept is None else pools[kept]
        return lambda x: widened_product(x.to(product), weight()).to(x.dtype)

    return {way: own if way == "packed" else run(way) for way in ways_of(layer)}


def _in_four_bits(weight: Callable[[], Any], out: int, x: Tensor) -> Tensor:
    if many.takes(x, out):
        return many.product(x, weight())
    return four_bit.product(x.float(), weight(), narrow=x.dtype is torch.bfloat16).to(x.dtype)


class _Pool:
    """Copies (out, in) of one kind, each call another one until all were used."""

    def __init__(self, pool: Tensor, rows: int, width: int, kind: Copy, computed: torch.dtype) -> None:
        self._next = 0
        if kind == "four-bit":
            self._weights = _four_bits(pool, rows, width, computed)
            return
        dtype = kept_in(kind, computed)
        numbers, size = pool.view(dtype), rows * width
        starts = range(0, max(1, len(numbers) - size + 1), size)[:_COPIES]
        if len(numbers) < size:
            numbers = torch.full((size,), 0.5, dtype=dtype)
        self._weights = [laid_out(numbers[at : at + size].view(rows, width), kind, computed) for at in starts]

    def __call__(self) -> Any:
        self._next = (self._next + 1) % len(self._weights)
        return self._weights[self._next]


def _four_bits(pool: Tensor, rows: int, width: int, computed: torch.dtype) -> list[Any]:
    """4-bit weights of whatever the pool's bytes mean."""
    size, scales = rows * width // 2, torch.full((rows, width // four_bit.BLOCK), 0.5, dtype=torch.float32)
    codes = pool.view(torch.uint8) if pool.nbytes >= size else torch.zeros(size, dtype=torch.uint8)
    starts = range(0, len(codes) - size + 1, size)[:_COPIES]
    return [four_bit.FourBit(codes[at : at + size].view(rows, -1), scales, computed) for at in starts]


def _small(layer: Any, rows: int) -> nn.Linear:
    """A 4-bit layer of the same kind with so many outputs; its numbers are nothing, which takes as long."""
    import bitsandbytes as bnb

    like, width = layer.weight.quant_state, layer.in_features
    made = bnb.nn.Linear4bit(width, rows, False, layer.compute_dtype, quant_type=like.quant_type, device="meta").eval()
    state = bnb.functional.QuantState(
        absmax=torch.ones(-(rows * width // -like.blocksize)),
        shape=torch.Size((rows, width)),
        code=bnb.functional.get_4bit_type(like.quant_type, device="cpu"),
        blocksize=like.blocksize,
        quant_type=like.quant_type,
        dtype=layer.compute_dtype,
    )
    data = torch.zeros((rows * width + 1) // 2, 1, dtype=torch.uint8)
    made.weight = bnb.nn.Params4bit(
        data, requires_grad=False, quant_state=state, quant_type=like.quant_type, module=made, bnb_quantized=True
    )
    made.support_avx512bf16_for_cpu = layer.support_avx512bf16_for_cpu
    return made  # type: ignore[no-any-return]
