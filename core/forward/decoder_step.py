"""A decoding step of a Llama-like decoder on a CPU: its layers multiply, and `kernels.py` does what lies between them.

    x (rows, 1, H)                    what a block is given and adds to
    norm -> q, k, v -> rope, cache -> attention -> o, added
    norm -> gate, up -> silu(gate) * up -> down, added

Over 4-bit weights a step is one call where it can be (`whole_step.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lora_rt.core.engine.lanes import LanePass
from lora_rt.core.engine.plan import running_pass
from lora_rt.core.engine.shared import SharedPass
from lora_rt.core.engine.site import unrounded
from lora_rt.core.forward.decoder import Decoder, head_norms

_log = logging.getLogger("lora_rt.engine")

_ROOMS = 8  # numbers of rows for which room is kept


class _Input(NamedTuple):
    """What layers are given, (rows, 1, width): in the model's dtype and in float32, as tensors and as arrays."""

    given: Tensor
    wide: Tensor
    out: Any
    wide_out: Any


class _Keys(NamedTuple):
    """The shape of a token's keys (rows, heads, 1, D), and a tensor of the shape in which a layer gives them."""

    shape: tuple[int, int, int, int]
    given: Tensor


class DecoderStep:
    """The step of one model; any number of threads may take it at once."""

    def __init__(self, decoder: Decoder) -> None:
        from lora_rt.core.forward import kernels

        kernels.prepare()
        self._kernels = kernels
        self.decoder = decoder
        self.whole: Any = None
        try:
            from lora_rt.core.forward.whole_step import WholeStep

            self.whole = WholeStep(decoder)
        except Exception as error:  # another release of numba may lack what it stands on
            _log.warning("steps are made block by block, which is slower: %s", error)
        self._rooms: dict[int, _Room] = {}  # by the number of rows; who uses one takes it out

    def can(self, cache: Any) -> bool:
        """Whether the next step may be this one; see `Decoder.can`."""
        return self.decoder.can(cache)

    def __call__(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: Any) -> Tensor:
        """The logits (rows, 1, vocab) of one more token each.

        Args:
            ids, positions: (rows, 1).
            mask: (rows, columns), 0 where a row does not look; the last column is the token's own.
            cache: of the tokens before, which is extended.
        """
        rows, columns = len(ids), cache.get_seq_length() + 1
        if mask.shape != (rows, columns):  # what lies beyond would be read as it is
            raise ValueError(f"a mask of {tuple(mask.shape)} for {rows} rows of {columns} columns")
        decoder = self.decoder.model.model
        embedded = decoder.embed_tokens(ids)
        ropes = decoder.rotary_emb(embedded, positions)  # (rows or 1, 1, D) both
        ropes_of = {part.shape for part in ropes}
        fit = ropes_of in ({(rows, 1, self.decoder.size)}, {(1, 1, self.decoder.size)})
        if not fit or embedded.shape != (rows, 1, self.decoder.hidden):
            raise ValueError(f"rope factors of {ropes_of} and embeddings of {tuple(embedded.shape)} for {rows} rows")
        given = embedded.to(self.decoder.dtype, copy=True), *ropes
        current = running_pass()
        if self.whole is not None and (current is None or isinstance(current, (SharedPass, LanePass))):
            plan = (None, None) if current is None else (current.topology, current.few(self._kernels))
            ready = self.whole.ready(rows, *plan)
            if ready is not None:
                found: Tensor = self.whole(*given, mask, cache, ready)
                return found
        room = self._rooms.pop(rows, None) or _Room(self.decoder, rows)
        logits = self._stepped(room, given, mask, cache)
        self._rooms[rows] = room
        for number in list(self._rooms)[:-_ROOMS]:
            self._rooms.pop(number, None)
        return logits

    def _stepped(self, room: _Room, given: Sequence[Tensor], mask: Tensor, cache: Any) -> Tensor:
        k, decoder = self._kernels, self.decoder.model.model
        x, cos, sin = map(_array, given)  # x (rows, 1, H): the blocks add to it
        seen = mask.bool().numpy()
        if isinstance(current := running_pass(), SharedPass):
            current.use(k)
        added: Tensor | None = None  # what the layers before have made, which x still lacks
        for number, block in enumerate(decoder.layers):
            attention, mlp = block.self_attn, block.mlp
            to_heads, to_o, to_gate, to_down = room.inputs[number]
            self._norm(block.input_layernorm, x, added, to_heads)
            query = self._sum(attention.q_proj, to_heads, to_o)
            key, value = (self._sum(layer, to_heads, room.keys) for layer in (attention.k_proj, attention.v_proj))
            for norm, of in zip(head_norms(attention), (query, key), strict=False):
                k.head_norm(_array(of), _array(norm.weight), norm.variance_epsilon, x)
            k.rotate(_array(query), cos, sin, room.query)
            new = torch.empty(room.keys.shape, dtype=self.decoder.dtype, device="cpu")
            k.rotate(_array(key), cos, sin, _array(new))
            keys, values = cache.layers[number].update(new, value.to(self.decoder.dtype).view(room.keys.shape))
            steps = (keys.shape[1], *keys.stride()[:3], *values.stride()[:3])
            k.attend(room.query, _flat(keys), _flat(values), steps, seen, attention.scaling, to_o.out, to_o.wide_out)
            self._norm(block.post_attention_layernorm, x, self._sum(attention.o_proj, to_o, to_gate), to_gate)
            gate, up = self._sum(mlp.gate_proj, to_gate, to_down), self._sum(mlp.up_proj, to_gate, to_down)
            k.silu_gated(_array(gate), _array(up), to_down.out, to_down.wide_out)
            added = self._sum(mlp.down_proj, to_down, to_heads)
        self._norm(decoder.norm, x, added, room.last)
        logits: Tensor = self.decoder.model.lm_head(
            room.last.given.clone()
        )  # whoever watches may keep what it is given
        return logits

    def _sum(self, layer: nn.Module, given: _Input, like: _Input | _Keys) -> Tensor:
        """What a layer makes of its input, (rows, 1, width): as wide as what is made of it, or memory would be torn."""
        found = unrounded(layer, given.given, given.wide)
        if found.shape != like.given.shape:
            raise ValueError(f"a layer gives {tuple(found.shape)} where {tuple(like.given.shape)} is wanted")
        return found if found.dtype in (torch.float32, self.decoder.dtype) else found.to(self.decoder.dtype)

    def _norm(self, norm: Any, x: Any, added: Tensor | None, into: _Input) -> None:
        weight, eps = _array(norm.weight), norm.variance_epsilon
        if added is None:
            self._kernels.rms_norm(x, weight, eps, into.out, into.wide_out)
        else:
            self._kernels.add_norm(x, _array(added), weight, eps, into.out, into.wide_out)


class _Room:
    """Where the numbers of a step lie that no layer makes.

    All blocks share the memory, and each has tensors of its own: a pass tells by the tensor whether it has seen an x.
    """

    def __init__(self, d: Decoder, rows: int) -> None:
        keys = torch.empty(rows, 1, d.keys * d.size, dtype=d.dtype, device="cpu")
        self.keys = _Keys((rows, d.keys, 1, d.size), keys)
        self.query = _array(torch.empty(rows, d.heads, 1, d.size, dtype=d.dtype, device="cpu"))
        memory = [
            (torch.empty(rows, 1, width, dtype=d.dtype), torch.empty(rows, 1, width, dtype=torch.float32))
            for width in (d.hidden, d.heads * d.size, d.hidden, d.width)
        ]
        self.inputs = [[_input(*pair) for pair in memory] for _ in d.model.model.layers]
        self.last = _input(*memory[0])


def _input(given: Tensor, wide: Tensor) -> _Input:
    """The same memory by new tensors."""
    given, wide = given.view_as(given), wide.view_as(wide)
    return _Input(given, wide, _array(given), _array(wide))


def _array(tensor: Tensor) -> Any:
    """The tensor's memory as numpy sees it: the bits of bfloat16 as uint16."""
    tensor = tensor.detach()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _flat(kept: Tensor) -> Any:
    """All memory between the first and the last number of keys or values, (numbers,)."""
    last = sum((length - 1) * step for length, step in zip(kept.shape, kept.stride(), strict=True))
    return _array(kept.as_strided((last + 1,), (1,)))
