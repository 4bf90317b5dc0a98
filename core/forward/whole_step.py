"""A decoding step over 4-bit weights in one call: from embedding to output head `whole_kernel.py` makes all numbers.

Between two products of a step by blocks stand a dozen calls from Python, one thread makes what lies between them, and
the others begin and end with each product. Of a base of 135 million parameters that was half of a step of one row.

So it is done where all layers have weights for the 4-bit kernel, that one is fast enough for so many rows, and adapters
add what `AddedToSteps` says: no hooks, gates of heads, scales or biases. Else `ready` gives nothing, and the step is by
blocks.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from operator import attrgetter, is_
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn

from lora_rt.core.engine.few_rows import AddedToSteps
from lora_rt.core.engine.site import Multiplied, multiplied
from lora_rt.core.forward import kernels
from lora_rt.core.forward import whole_kernel as k
from lora_rt.core.forward.decoder import Decoder
from lora_rt.core.forward.step_adapters import GROUPS, Adapters, adapters_of
from lora_rt.core.forward.unchanged import Parameters, Place, have_hooks, own, place_in, stand
from lora_rt.core.multiply import four_bit
from lora_rt.core.multiply.ways import is_vector
from lora_rt.core.native import openmp

_log = logging.getLogger("lora_rt.engine")

_COMPILING = threading.Lock()
_ROOMS = 8  # numbers of rows for which room is kept
_LINEARS = (
    *(("self_attn", name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(("mlp", name) for name in ("gate_proj", "up_proj", "down_proj")),
)
_eps, _scaling = attrgetter("variance_epsilon"), attrgetter("scaling")


class _Layer(NamedTuple):
    """One linear layer as the table has it."""

    how: Multiplied
    weight: four_bit.FourBit
    bias: Tensor | None  # its memory, while it is read


class _Found:
    """The layers of a model (none where one can't be taken), their table, and what plans add to them.

    `near` is whether the 4-bit kernel is fast enough for so many rows, of those that were asked for. Of a plan it is
    also known for how many rows, and which numbers its layers had: when a bank is closed, they have none.
    """

    def __init__(self, places: Sequence[Place] = ()) -> None:
        self.layers: list[_Layer] = []
        self.table: Any = None
        self.near: dict[int, bool] = {}
        self.plans: WeakKeyDictionary[AddedToSteps, tuple[Any, Adapters | None]] = WeakKeyDictionary()
        self._places = places
        self._modules = [place.module for place in places]
        self._parameters = [Parameters(self._modules, "weight", copied=True), Parameters(self._modules, "bias")]

    def stand(self) -> bool:
        """Whether all layers are still what they were, and nobody watches them."""
        if not stand(self._places) or have_hooks(self._modules):
            return False
        forwards = [layer.how.forward for layer in self.layers]
        return all(map(is_, own(self._modules, "forward"), forwards)) and all(one.stand() for one in self._parameters)

    def numbers(self, topology: Any) -> list[int | None]:
        """The number of each layer in a topology."""
        return [layer.how.numbers.get(topology) for layer in self.layers]


class _Normed(NamedTuple):
    """The table of layers with that of norms, what these add to a mean square, and what was read for it."""

    of: _Found
    table: Any
    numbers: Any
    weights: list[Tensor]
    parameters: Parameters
    attributes: list[list[float]]


class _Ready(NamedTuple):
    """What a step reads besides its tokens; whoever has it keeps alive what the tables point to."""

    found: _Found
    table: Any
    numbers: Any
    norms: list[Tensor]
    adapters: Adapters
    added: AddedToSteps | None
    address: int


class WholeStep:
    """The step of one model; any number of threads may take it at once."""

    def __init__(self, decoder: Decoder) -> None:
        """To be made of a decoder that a `DecoderStep` takes."""
        self._decoder, self._model, self._dtype = decoder, decoder.model, decoder.dtype
        self._address: int | None = None  # 0 where it can't be compiled
        hidden, width = decoder.hidden, decoder.width
        queries, keys = decoder.heads * decoder.size, decoder.keys * decoder.size
        into, to_keys = (hidden, width), (hidden, keys)
        self._shapes = (hidden, queries), to_keys, to_keys, (queries, hidden), into, into, (width, hidden)
        blocks = decoder.model.model.layers
        self._norms = _norms(decoder.model)
        self._normed: _Normed | None = None
        self._attentions = [block.self_attn for block in blocks]
        self._found = _Found()
        self._refused: tuple[int, int] | None = None  # block and place of a layer that can't be taken
        self._none = Adapters(np.zeros((len(blocks), k.ADAPTED), np.int64), (), 1, 1)
        self._rooms: dict[int, _Room] = {}  # by the number of rows; who uses one takes it out
        self.always = False  # whatever is faster: in a trial

    def takes_all(self) -> bool:
        """Whether all layers have weights that it can read."""
        return bool(self._standing().layers)

    def _standing(self) -> _Found:
        """All layers as they are now."""
        found = self._found
        if not found.layers or not found.stand():
            self._normed = None  # which keeps copies of the weights before
            found = self._found = self._looked_up()
        return found

    def ready(self, rows: int, topology: Any, added: AddedToSteps | None) -> _Ready | None:
        """What a step of so many rows reads, after `DecoderStep.can`; None where it can't be made so.

        Args:
            topology, added: of the plan that is running, None for the base alone.
        """
        found = self._standing()
        if not found.layers:
            return None
        if rows not in found.near:
            found.near[rows] = all(layer.how.product.is_near(rows) for layer in found.layers)
        if not (self.always or found.near[rows]):
            return None
        adapters: Adapters | None = self._none
        if added is not None:
            numbers = found.numbers(topology)
            known = rows, numbers
            before = found.plans.get(added)
            if before is None or before[0] != known:
                before = found.plans[added] = known, adapters_of(self._shapes, numbers, added, rows)
            adapters = before[1]
        if adapters is None or adapters.rows not in (1, rows):
            return None
        address = self._compiled()
        if not address:
            return None
        normed = self._with_norms(found)
        return _Ready(found, normed.table, normed.numbers, normed.weights, adapters, added, address)

    def _compiled(self) -> int:
        """Where the kernel lies, 0 where it can't be compiled; to do that takes ten seconds, once on a machine."""
        if self._address is not None:
            return self._address
        with _COMPILING:
            try:
                self._address = k.step_of(np.uint16 if self._dtype == torch.bfloat16 else np.float32)
            except Exception as error:  # another release of numba may refuse it in any way
                _log.warning("steps are made block by block, which is slower: %s", error)
                self._address = 0
            return self._address

    def _looked_up(self) -> _Found:
        """All layers and their table; none where one can't be taken."""
        blocks = self._model.model.layers
        if self._refused is not None:
            number, site = self._refused
            if number < len(blocks) and self._taken(self._places_of(blocks[number])[site].module, site) is None:
                return _Found()
        places = [place for block in blocks for place in self._places_of(block)]
        for count, place in enumerate(places):
            number, site = divmod(count, len(GROUPS))
            if self._taken(place.module, site) is None:
                self._refused = number, site
                return _Found()
        found = _Found(places)  # before anything is read of them, and after it is known that they can be asked
        found.table = np.zeros((len(blocks) + 1, k.BLOCK), np.int64)
        for count, place in enumerate(places):
            number, site = divmod(count, len(GROUPS))
            layer = self._taken(place.module, site)
            if layer is None:  # it was replaced meanwhile
                return _Found()
            found.layers.append(layer)
            codes, scales, _ = layer.weight
            bias_at = 0 if layer.bias is None else layer.bias.data_ptr()
            at = k.LAYER + k.FACTS * site
            found.table[number, at : at + k.FACTS] = codes.data_ptr(), scales.data_ptr(), bias_at, *self._shapes[site]
        return found

    @staticmethod
    def _places_of(block: Any) -> list[Place]:
        return [place_in(block._modules[part], name) for part, name in _LINEARS]

    def _taken(self, layer: nn.Module | None, site: int) -> _Layer | None:
        """A layer, where the kernel multiplies as it does."""
        how = None if layer is None else multiplied(layer)
        if layer is None or how is None or how.product.dtype is not self._dtype:
            return None
        weight, bias = how.product.four_bit(), layer._parameters.get("bias")
        if weight is None or weight.dtype is not self._dtype:
            return None
        out, half = weight.codes.shape
        if (2 * half, out) != self._shapes[site]:  # memory would be torn
            return None
        if bias is not None and not is_vector(bias, out, self._dtype):
            return None
        return _Layer(how, weight, None if bias is None else bias.detach())

    def _with_norms(self, found: _Found) -> _Normed:
        """The table with the places of the norms' weights, and what they add."""
        norms = [norm for _, norm in self._norms]
        attributes = [list(map(_eps, norms)), list(map(_scaling, self._attentions))]
        before = self._normed
        if before is not None and before.of is found and before.attributes == attributes and before.parameters.stand():
            return before
        parameters, read = Parameters(norms, "weight"), []
        table, numbers = found.table.copy(), np.zeros((len(found.table), k.FLOATS), np.float64)
        for ((number, at), norm), eps in zip(self._norms, attributes[0], strict=True):
            weight = norm._parameters["weight"].detach()
            table[number, at], numbers[number, at] = weight.data_ptr(), eps
            read.append(weight)
        numbers[:-1, k.SCALING] = attributes[1]
        self._normed = _Normed(found, table, numbers, read, parameters, attributes)
        return self._normed

    def __call__(self, embedded: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, cache: Any, ready: _Ready) -> Tensor:
        """The logits (rows, 1, vocab), as of `DecoderStep`.

        Args:
            embedded: (rows, 1, H). cos, sin: (rows or 1, 1, D).
            ready: what `ready` has said just now.
        """
        rows, columns = mask.shape
        decoder = self._decoder
        ropes = [part.float().contiguous() for part in (cos, sin)]
        room = self._rooms.pop(rows, None) or _Room(decoder, rows)
        room.x.copy_(embedded)
        threads = torch.get_num_threads()
        team = openmp.team() if threads > 1 else None
        scores = k.SCORED * kernels.room_of.py_func(columns)
        scratch = np.empty(threads * scores, np.uint8), np.empty(threads * k.CALL, np.int64)
        widest = ready.adapters.ranks
        ranks, kept = np.empty(rows * widest, np.float32), np.empty(threads * widest, np.int64)
        seen = np.ascontiguousarray(mask.bool().numpy())
        extended = self._extended(cache, rows, columns)
        s = np.zeros(k.STEP, np.int64)
        s[: k.BARRIER] = (
            rows,
            columns,
            len(self._model.model.layers),
            decoder.hidden,
            decoder.heads,
            decoder.keys,
            decoder.size,
            decoder.width,
            len(ropes[0]),
        )
        s[k.BARRIER : k.PART] = (0, 0, 0) if team is None else (team.barrier, team.number, team.size)
        s[k.PART] = four_bit.kernel_of(self._dtype, widest=max(width for width, _ in self._shapes))[1]
        s[k.LAYERS : k.X] = [one.ctypes.data for one in (ready.table, ready.numbers, extended, ready.adapters.table)]
        s[[k.COS, k.SIN]] = [one.data_ptr() for one in ropes]
        s[k.SEEN] = seen.ctypes.data
        for place, tensor in room.places.items():
            s[place] = tensor.data_ptr()
        s[k.RANKS], s[k.RANKS_WIDTH] = ranks.ctypes.data, widest
        s[k.KEPT] = kept.ctypes.data
        s[k.SCORES], s[k.CALLS] = scratch[0].ctypes.data, scratch[1].ctypes.data
        openmp.run(team, ready.address, s.ctypes.data, threads)
        logits: Tensor = self._model.lm_head(room.out.clone())  # whoever watches may keep what it is given
        self._rooms[rows] = room
        for number in list(self._rooms)[:-_ROOMS]:
            self._rooms.pop(number, None)
        return logits

    def _extended(self, cache: Any, rows: int, columns: int) -> Any:
        """The table of a cache whose layers have one more column, in which anything stands."""
        heads, size = self._decoder.keys, self._decoder.size
        shape, found = (rows, heads, columns, size), []
        blank = torch.empty(rows, heads, 1, size, dtype=self._dtype, device="cpu")
        if len(cache.layers) != len(self._model.model.layers):
            raise ValueError(f"a cache of {len(cache.layers)} layers for {len(self._model.model.layers)} blocks")
        for layer in cache.layers:
            keys, values = layer.stretched(rows) or layer.update(blank, blank)
            if not keys.shape == values.shape == shape:
                raise ValueError(f"keys of {tuple(keys.shape)} where {shape} are wanted")
            of_keys, of_values = keys.stride(), values.stride()
            if of_keys[3] != 1 or of_values[3] != 1:
                raise ValueError("keys or values that do not lie one number after the other")
            found.append((keys.data_ptr(), values.data_ptr(), *of_keys[:3], *of_values[:3]))
        return np.array(found, np.int64)


class _Room:
    """Where the numbers of a step lie, (rows, width) float32 each, and what is read of it in the end."""

    def __init__(self, d: Decoder, rows: int) -> None:
        queries, keys = d.heads * d.size, d.keys * d.size
        widths = queries, keys, keys, d.hidden, d.width, d.width, d.hidden
        with torch.inference_mode(False):  # what is made in it can't be written outside of it
            x, normed, attended, *outputs = (
                torch.empty(rows, 1, width, dtype=torch.float32, device="cpu")
                for width in (d.hidden, d.hidden, queries, *widths)
            )
            self.out = torch.empty(rows, 1, d.hidden, dtype=d.dtype, device="cpu")
        inputs = normed, attended, normed, outputs[4]  # silu(gate) * up lies where gate was
        self.places = {k.X: x, k.OUT: self.out, **dict(enumerate((*inputs, *outputs), start=k.INPUT))}
        self.x = x


def _norms(model: Any) -> list[tuple[tuple[int, int], Any]]:
    """The norms of a model and their places in the table."""
    found = []
    for number, block in enumerate(model.model.layers):
        own = {k.NORM_1: block.input_layernorm, k.NORM_2: block.post_attention_layernorm}
        attention = block.self_attn
        own |= {k.NORM_Q: getattr(attention, "q_norm", None), k.NORM_K: getattr(attention, "k_norm", None)}
        found += [((number, place), norm) for place, norm in own.items() if norm is not None]
    return [*found, ((len(model.model.layers), k.NORM_1), model.model.norm)]
