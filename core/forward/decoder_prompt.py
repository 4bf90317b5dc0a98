"""A pass of many tokens of a Llama-like decoder on a CPU: its layers multiply, torch attends, and loops of ours do what
lies in between (`prompt_kernels.py`).

    x (rows, tokens, H)               what a block is given and adds to
    norm -> q, k, v -> rope, cache -> attention -> o, added
    norm -> gate, up -> silu(gate) * up -> down, added
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lora_rt.core.forward.decoder import Decoder, head_norms
from lora_rt.core.native import openmp

_LANES = 16  # numbers that loops make at a time
_PARTS = 8  # for each thread
_Arguments = ctypes.c_int64 * 9


class DecoderPrompt:
    """The passes of one model over many tokens; any number of threads may make them at once."""

    def __init__(self, decoder: Decoder) -> None:
        """To be made of a decoder that `fits`."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS  # which comes with a model anyway, and late

        from lora_rt.core.forward import prompt_kernels

        self._decoder = decoder
        self._attentions, self._attend = ALL_ATTENTION_FUNCTIONS, ALL_ATTENTION_FUNCTIONS["sdpa"]
        self._normed, self._turned, self._gated = prompt_kernels.kernels(decoder.dtype is torch.bfloat16)

    def can(self, cache: Any) -> bool:
        """Whether the next pass may be this one; see `Decoder.can`. In training some would be dropped out."""
        model = self._decoder.model
        usual = model.config._attn_implementation == "sdpa" and self._attentions["sdpa"] is self._attend
        return usual and not model.training and self._decoder.can(cache)

    def __call__(self, ids: Tensor, positions: Tensor, mask: Tensor | None, cache: Any, keep: Any) -> Tensor:
        """The logits (rows, tokens or kept, vocab).

        Args:
            ids, positions: (rows, tokens) of this pass.
            mask: (rows, all tokens so far), 0 where no row looks; None where all are looked at.
            cache: of the tokens before, which is extended; None for none.
            keep: the last n tokens, or their indices, of which logits are wanted; None for all.
        """
        model = self._decoder.model.model
        rows, tokens = ids.shape
        x = self._fitting(model.embed_tokens(ids), (rows, tokens, self._decoder.hidden)).clone()
        ropes = self._ropes(model.rotary_emb(x, positions), rows, tokens)
        seen = _seen(mask, rows, tokens, 0 if cache is None else cache.get_seq_length())
        added: Tensor | None = None  # what the layers before have made, which x still lacks
        for number, block in enumerate(model.layers):
            attention, mlp = block.self_attn, block.mlp
            given = self._norm(block.input_layernorm, x, added)
            query, key, value = self._heads(attention, given, ropes)
            if cache is not None:
                key, value = cache.layers[number].update(key, value)
            answer, _ = self._attend(attention, query, key, value, seen, dropout=0.0, scaling=attention.scaling)
            answer = self._of_layer(attention.o_proj, answer.reshape(rows, tokens, -1), self._decoder.hidden)
            given = self._norm(block.post_attention_layernorm, x, answer)
            gate = self._own(mlp.gate_proj, given, self._decoder.width)
            up = self._of_layer(mlp.up_proj, given, self._decoder.width)
            _run(self._gated, gate.shape[-1], 0, rows * tokens, gate, up)
            added = self._of_layer(mlp.down_proj, gate, self._decoder.hidden)
        if keep is not None and added is not None:
            wanted = slice(-keep, None) if isinstance(keep, int) else keep
            x, added = x[:, wanted].contiguous(), added[:, wanted].contiguous()
        logits: Tensor = self._decoder.model.lm_head(self._norm(model.norm, x, added))
        return logits

    def _heads(self, attention: nn.Module, given: Tensor, ropes: list[Tensor]) -> list[Tensor]:
        """Queries, keys and values, (rows, heads, tokens, D), the first two by their places."""
        size, (rows, tokens, _) = self._decoder.size, given.shape
        widths = {"q_proj": self._decoder.heads, "k_proj": self._decoder.keys, "v_proj": self._decoder.keys}
        found = [self._own(getattr(attention, name), given, size * count) for name, count in widths.items()]
        for norm, of in zip(head_norms(attention), found, strict=False):
            _run(self._normed, size, bits_of(norm.variance_epsilon), of.numel() // size, of, None, norm.weight, of)
        for of in found[:2]:
            _run(self._turned, of.shape[-1] // size, size, rows * tokens, of, *ropes)
        return [of.view(rows, tokens, -1, size).transpose(1, 2) for of in found]

    def _norm(self, norm: Any, x: Tensor, added: Tensor | None) -> Tensor:
        """RMSNorm of x, to which something is added first."""
        found = torch.empty_like(x)
        width = x.shape[-1]
        _run(self._normed, width, bits_of(norm.variance_epsilon), x.numel() // width, x, added, norm.weight, found)
        return found

    def _ropes(self, parts: Sequence[Tensor], rows: int, tokens: int) -> list[Tensor]:
        """Cosines and sines of each token, (rows, tokens, D)."""
        size = self._decoder.size
        for part in parts:
            if part.shape not in ((rows, tokens, size), (1, tokens, size)):
                raise ValueError(f"rope factors of {tuple(part.shape)} for {rows} x {tokens} tokens")
        return [part.to(self._decoder.dtype).expand(rows, tokens, size).contiguous() for part in parts]

    def _of_layer(self, layer: Any, given: Tensor, width: int) -> Tensor:
        """What a layer makes of its input, as wide as loops read it."""
        return self._fitting(layer(given), (*given.shape[:-1], width))

    def _own(self, layer: Any, given: Tensor, width: int) -> Tensor:
        """The same, to be changed in place: whoever watches the layer may keep what it gives."""
        found = self._of_layer(layer, given, width)
        return found.clone() if layer._forward_hooks or found.data_ptr() == given.data_ptr() else found

    def _fitting(self, found: Tensor, shape: tuple[int, ...]) -> Tensor:
        """The same numbers as loops read them: of another shape they would tear memory."""
        if found.shape != shape or not found.is_cpu:
            raise ValueError(f"a layer gives {tuple(found.shape)} on {found.device} where {shape} is wanted")
        return found.to(self._decoder.dtype).contiguous()


def fits(model: Any) -> bool:
    """Whether a model that `is_known` has widths that loops take: whole registers, and whole ones of half a head."""
    block = model.model.layers[0]
    heads, mlp = block.self_attn, block.mlp
    widths = heads.q_proj.in_features, mlp.gate_proj.out_features, heads.head_dim // 2
    return not any(width % _LANES for width in widths) and not heads.head_dim % 2


def _seen(mask: Tensor | None, rows: int, tokens: int, before: int) -> Tensor | None:
    """Where each token looks, (rows, 1, tokens, columns); None where it is at all that stand before it."""
    columns = before + tokens
    if mask is None and not before:
        return None
    places = torch.arange(columns, device="cpu")  # whatever others have made the default
    seen = places <= places[before:, None]
    if mask is not None:
        if mask.shape != (rows, columns):
            raise ValueError(f"a mask of {tuple(mask.shape)} for {rows} rows of {columns} columns")
        seen = seen & mask.bool()[:, None]
    return seen.expand(rows, tokens, columns)[:, None]


def bits_of(eps: float) -> int:
    """The bits of a number in float32."""
    return int(np.float32(eps).view(np.int32))


def _run(address: int, one: int, other: int, tokens: int, *arrays: Tensor | None) -> None:
    """Let a function go through so many tokens, or through as many heads."""
    if tokens == 0:
        return
    threads = torch.get_num_threads()
    parts = min(_PARTS * threads, tokens)
    places = [0 if array is None else array.data_ptr() for array in arrays]
    places += [0] * (4 - len(places))
    openmp.run(openmp.team(), address, _Arguments(0, parts, one, other, tokens, *places), threads if parts > 1 else 1)
