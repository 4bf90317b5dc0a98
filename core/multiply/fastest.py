"""The products of a base's layers, each in the way that is fastest here, with the dense copies that pay off and fit.

Decided when a base is put to use, for each shape of layers and each class of tokens: one process always multiplies the
same layer by the same number of tokens in the same way, but for decoding steps in one call, which read 4 bits.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from lora_rt.core.base.choices import Wish, check_wish
from lora_rt.core.base.machine import free_bytes
from lora_rt.core.base.source import BaseError
from lora_rt.core.multiply import four_bit
from lora_rt.core.multiply.measured import Times, layer_name, times_of
from lora_rt.core.multiply.product import Product
from lora_rt.core.multiply.ways import SIZES, Copy, Way, computes_in, is_4bit, keeps, nbytes_of, packs, ways_of

Ways = tuple[Way, ...]
"""One for each class of `SIZES`."""

_TINY = 4_000_000  # numbers in all layers of a base, below which there is nothing to gain
_SHARE = 0.5  # of the free memory that dense copies may take
_GAIN = 0.9  # a way is left for another one only if that takes at most this share of its time
_GAIN_ALONE = 0.75  # the same for single tokens: a copy of an output head takes as long to make as three hundred steps
_HARDLY = 1.3  # so much slower may the 4-bit kernel be in a step in one call, which saves what lies between products
_SAVED = 20.0  # microseconds that a product of its own takes at least before and after it, which such a step has not
_PAYS = 0.85  # the same of a set of copies for one that takes more memory, for the number of tokens that gains most
_PAYS_BESIDE_OURS = 0.75
"""The same where nothing dense was kept, of many tokens or on the average: to make the copies of a base takes a second
or two, and what others do on the machine meanwhile may make a class of few tokens look as slow as that."""
_COPIES: tuple[frozenset[Copy], ...] = (
    frozenset(),
    frozenset(("four-bit",)),
    frozenset(("narrow",)),
    frozenset(("half",)),
    frozenset(("wide",)),
    frozenset(("blocked",)),
    frozenset(("narrow", "four-bit")),
    frozenset(("half", "four-bit")),
    frozenset(("wide", "four-bit")),
    frozenset(("narrow", "half")),
    frozenset(("narrow", "wide")),
    frozenset(("narrow", "blocked")),
)
"""The dense copies that a layer may have; smaller ones come first."""

_NEVER = 1e12  # microseconds, for a way that was not tried: two of infinity could not be told apart
_TOLD: Ways = ("packed", "dense", "dense-wide", "dense-blocked", "dense-half", "four-bit", "tiles", "as-it-lies")
_IN_WORDS: Mapping[Way, str] = {
    "packed": "the layer's own product",
    "dense": "a dense copy in the base's own dtype",
    "dense-wide": "a copy in float32",
    "dense-blocked": "a copy in float32, laid out in blocks",
    "dense-half": "a copy in float16",
    "four-bit": "our 4-bit kernel",
    "tiles": "our AMX kernel",
    "as-it-lies": "our float32 kernel",
}
_LEAN: Ways = ("four-bit", "as-it-lies")
"""Ways by kernels of our own that need no dense copy; a layer has one of them."""
_NO_GRADIENT: frozenset[Copy] = frozenset(("half", "blocked", "four-bit"))
"""Copies that a gradient can't be made with."""


class Products:
    """The products of a model's layers, until they are closed. `nbytes` is the memory of their dense copies."""

    def __init__(
        self, model: nn.Module, wish: str | None = None, *, for_training: bool = False, in_one_call: bool = False
    ) -> None:
        """Sets the forward of every layer that has a faster way; one whose forward somebody has set keeps it.

        To be made before the model's first forward pass, which packs 4-bit weights on some processors.

        Args:
            for_training: leave out what makes a pass faster and its gradient slower, and second copies for few tokens.
            in_one_call: the model's steps can be made in one call, where all 4-bit layers have the kernel's copies.

        Raises:
            BaseError, UsageError: there is no such wish, or the dense copies that are wished for do not fit.
        """
        chosen = check_wish(wish)
        layers = [] if chosen == "packed" else _layers(model)
        if chosen == "auto" and sum(map(_numbers, layers)) < _TINY:
            layers = []
        sets = [copies for copies in _COPIES if not (for_training and (copies & _NO_GRADIENT or len(copies) > 1))]
        room = int(free_bytes("cpu") * _SHARE)
        plan = choose(layers, chosen, room, sets, in_one_call=in_one_call) if layers else {}
        self.layers = [layer for layer in layers if set(plan[layer_name(layer)]) != {"packed"}]
        self.nbytes = sum(_nbytes(layer, plan[layer_name(layer)]) for layer in self.layers)
        times = times_of({layer_name(layer): layer for layer in self.layers})
        for layer in self.layers:
            ways = plan[layer_name(layer)]
            made = Product(layer, ways, _near(times[layer_name(layer)], ways))
            layer.forward = made  # type: ignore[method-assign,assignment]  # of this one alone
        for stack in _stacks(model, self.layers):
            for made in stack:
                made.beside = stack

    def keep(self) -> None:
        """Make all dense copies now instead of when they are first needed: what is free then is free."""
        for layer in self.layers:
            layer.forward.keep()  # type: ignore[attr-defined]

    def close(self) -> None:
        """Give the layers their own forwards back, and the memory of the copies."""
        for layer in self.layers:
            if isinstance(made := vars(layer).get("forward"), Product):
                made.beside = ()  # in a circle their copies would stay until it is looked for
                del layer.forward
        self.layers = []


def choose(
    layers: Sequence[nn.Linear],
    wish: Wish,
    room: int,
    sets: Sequence[frozenset[Copy]] = _COPIES,
    *,
    in_one_call: bool = False,
) -> dict[str, Ways]:
    """Layer name -> its ways, with the dense copies that pay off among those sets that fit into `room` bytes.

    Args:
        in_one_call: see `Products`.

    Raises:
        BaseError: those that are wished for do not.
    """
    counts = Counter(map(layer_name, layers))
    examples = {layer_name(layer): layer for layer in layers}
    times = times_of(examples)
    shares = {name: counts[name] * _numbers(layer) for name, layer in examples.items()}
    best: tuple[list[float], dict[str, Ways]] | None = None
    needed = []
    for copies in sets:
        plan = {name: _ways(layer, times[name], wish, copies) for name, layer in examples.items()}
        if not all(plan.values()):
            continue
        at_once: list[int] = []
        if in_one_call and wish == "auto" and "four-bit" in copies:
            at_once = _at_once(examples, counts, times, plan)
        if at_once:
            for name, layer in examples.items():
                if is_4bit(layer):
                    ways = _ways(layer, times[name], wish, copies, pack=False)
                    plan[name] = tuple("four-bit" if n in at_once else way for n, way in enumerate(ways))
        size = sum(counts[name] * _nbytes(layer, plan[name]) for name, layer in examples.items())
        needed.append(size)
        if size > room:
            continue
        took = _took({name: (shares[name], times[name], ways) for name, ways in plan.items()})
        for number in at_once:
            took[number] -= math.log(_HARDLY)
        if best is None or _pays(took, *best):
            best = took, plan
    if best is None:
        text = (
            f"dense copies of its weights take {min(needed) / 2**30:.1f} GiB, and {room / 2**30:.1f} are there for them"
        )
        raise BaseError(text, next_step="Use --multiply auto or dequantize, or a smaller base")
    return best[1]


def _at_once(
    examples: Mapping[str, nn.Linear], counts: Mapping[str, int], times: Mapping[str, Times], plan: Mapping[str, Ways]
) -> list[int]:
    """The classes of few tokens for which a pass by the 4-bit kernel alone is hardly slower than what is planned.

    Of a small layer most of what is measured lies between two products, and is not there in a step in one call: so what
    counts is what all layers take.
    """
    packed = [name for name, layer in examples.items() if is_4bit(layer)]

    def took(number: int, way: Way | None) -> float:
        return sum(counts[name] * _time(times[name], way or plan[name][number], number) for name in packed)

    saved = _SAVED * sum(counts[name] for name in packed)
    return [n for n in range(len(SIZES) - 1) if packed and took(n, "four-bit") - saved <= _HARDLY * took(n, None)]


def fastest(times: Times, ways: Sequence[Way]) -> Ways:
    """The fastest for each class of tokens; one that needs no dense copy, where it is hardly slower."""

    def pick(number: int) -> Way:
        best = min(ways, key=lambda way: _time(times, way, number))
        for lean in _LEAN:
            near = lean in ways and _time(times, best, number) > _GAIN * _time(times, lean, number)
            if near and _is_dense(best):
                best = lean
        gain = _GAIN_ALONE if _is_dense(best) and number == 0 else _GAIN
        near = "packed" in ways and _time(times, best, number) > gain * _time(times, "packed", number)
        return "packed" if near else best

    return tuple(map(pick, range(len(SIZES))))


def _is_dense(way: Way) -> bool:
    """Whether a dense copy is kept for it, which takes long to make; codes for the 4-bit kernel are there at once."""
    return keeps(way) not in (None, "four-bit")


def _pays(took: Sequence[float], before: Sequence[float], plan: Mapping[str, Ways]) -> bool:
    """Whether copies with which products take so long (`_took`) are worth it beside a plan without them."""
    gains = [new - old for new, old in zip(took, before, strict=True)]
    if _is_lean(plan):
        return min(gains[-1], sum(gains) / len(gains)) < math.log(_PAYS_BESIDE_OURS)
    return sum(gains) < 0 and min(gains) < math.log(_PAYS)


def _is_lean(plan: Mapping[str, Ways]) -> bool:
    """Whether kernels of our own multiply each layer by some numbers of tokens, and no dense copy is kept."""
    return all(not {*_LEAN}.isdisjoint(ways) and not any(map(_is_dense, ways)) for ways in plan.values())


def told(known: Mapping[str, Times]) -> dict[str, str]:
    """Name (`layer_name`) -> how such layers are multiplied where copies fit, and the memory of one copy."""
    best: tuple[list[float], dict[str, Ways]] | None = None
    for copies in _COPIES:
        plan = {
            name: fastest(times, [way for way in _TOLD if way in times and keeps(way) in (None, *copies)])
            for name, times in known.items()
        }
        took = _took({name: (_size(name), known[name], ways) for name, ways in plan.items()})
        # As for a base whose steps are made in one call, where there is a layer in 4 bits.
        if "four-bit" in copies and any("four-bit" in times for times in known.values()):
            took[:-1] = [one - math.log(_HARDLY) for one in took[:-1]]
        if best is None or _pays(took, *best):
            best = took, plan
    assert best is not None
    return {name: _words(name, known[name], ways) for name, ways in best[1].items()}


def _words(name: str, times: Times, ways: Ways) -> str:
    shown = {"one token": 0, "4 to 7 tokens": 2, "64 or more": 5}
    by_tokens = {tokens: _IN_WORDS.get(ways[number], ways[number]) for tokens, number in shown.items()}
    words = "; ".join(f"{tokens}: {way}" for tokens, way in by_tokens.items())
    if len(set(by_tokens.values())) == 1:
        words = f"one token or many: {by_tokens['one token']}"
    dense = _size(name) * 2 / 2**20
    sizes = f"{dense:.1f} MiB a copy in 16 bits, {2 * dense:.1f} MiB in float32"
    if "four-bit" in times:
        sizes += f", {0.3 * dense:.1f} MiB in 4 bits"
        if ways[0] != "four-bit":
            words += f"; a decoding step made in one call: {_IN_WORDS['four-bit']}"
    return f"{words}. Of the weight: {sizes}"


def _size(name: str) -> int:
    """The numbers of a layer of that name."""
    out, _, width = name.split()[:3]
    return int(out) * int(width)


def is_left_unpacked(model: nn.Module, in_one_call: bool) -> bool:
    """Whether bitsandbytes is not to pack the 4-bit layers of a model on a CPU: its steps are made in one call."""
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and is_4bit(layer)]
    fit = all(four_bit.could_fit(layer) for layer in layers)
    return in_one_call and fit and four_bit.could_be() and sum(map(_numbers, layers)) >= _TINY


def _ways(layer: nn.Linear, times: Times, wish: Wish, copies: frozenset[Copy], *, pack: bool = True) -> Ways:
    """The fastest ways of a layer among those that are wished for and that these copies allow; empty for none.

    Args:
        pack: whether a weight may be packed, which takes a little more memory, and can't be dequantized then.
    """
    if not is_4bit(layer):
        copies -= {"narrow", "four-bit"}  # it is the former itself
    lean = not copies - {"four-bit"}  # nothing dense is kept

    def allowed(way: Way) -> bool:
        return copy in copies if (copy := keeps(way)) else lean or not way.startswith("dequantize")

    ways = [way for way in ways_of(layer) if allowed(way) and (wish == "auto" or way.startswith(wish))]
    if not ways:
        return ()
    if packs(layer) and not pack:
        ways = [way for way in ways if way != "packed"]
    found = fastest(times, ways)
    if packs(layer) and "packed" in found:  # what was packed can't be dequantized any more
        found = fastest(times, [way for way in ways if not way.startswith("dequantize")])
    return found


def _near(times: Times, ways: Ways) -> list[int]:
    """The classes of tokens for which the 4-bit kernel is hardly slower than the way that is taken."""
    numbers = range(len(SIZES))
    return [n for n in numbers if _time(times, "four-bit", n) <= _HARDLY * _time(times, ways[n], n)]


def _stacks(model: nn.Module, layers: Sequence[nn.Linear]) -> list[list[Product]]:
    """The products of all blocks that stand under one name with a number; those of experts go their own ways."""
    found: dict[str, list[Product]] = {}
    wanted = set(map(id, layers))
    for name, module in model.named_modules():
        parts = name.split(".")
        numbers = [place for place, part in enumerate(parts) if part.isdigit()]
        if id(module) in wanted and len(numbers) == 1 and isinstance(module.forward, Product):
            found.setdefault(".".join(parts[: numbers[0]]), []).append(module.forward)
    return list(found.values())


def _layers(model: nn.Module) -> list[nn.Linear]:
    """All layers whose product can be made in other ways."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return [layer for layer in linears if "forward" not in vars(layer) and computes_in(layer) is not None]


def _numbers(layer: nn.Linear) -> int:
    return layer.in_features * layer.out_features


def _nbytes(layer: nn.Linear, ways: Iterable[Way]) -> int:
    """The memory of the copies that a layer needs for these ways."""
    kept = {copy for way in ways if (copy := keeps(way))}
    return sum(nbytes_of(copy, layer) for copy in kept)


def _time(times: Times, way: str, number: int) -> float:
    """Microseconds; infinite for a way that was not tried."""
    found = times[way][number] if way in times else None
    return math.inf if found is None else found


def _took(plan: Mapping[str, tuple[int, Times, Ways]]) -> list[float]:
    """For each class of tokens the mean logarithm of the times, by the numbers that layers of a shape have."""
    whole = sum(share for share, _, _ in plan.values())
    return [
        sum(share * math.log(min(_time(times, ways[n], n), _NEVER)) for share, times, ways in plan.values()) / whole
        for n in range(len(SIZES))
    ]
