"""A decoding step of a Llama-like decoder on a CPU: its layers multiply, and `kernels.py` does what lies between them.

    x (rows, 1, H)                    what a block is given and adds to
    norm -> q, k, v -> rope, cache -> attention -> o, added
    norm -> gate, up -> silu(gate) * up -> down, added

Layers are multiplied as the model multiplies them, with all that a running pass adds, and keys and values go into the
model's own cache. So a step may be this one and the next one the model's. Models are told by the names of their
classes in transformers, and each is tried before it is stepped so.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from lora_rt.core.engine.growing_cache import GrowingLayer
from lora_rt.core.engine.plan import running_pass
from lora_rt.core.engine.shared import SharedPass
from lora_rt.core.engine.site import unrounded

Hook = TypeVar("Hook", bound=Callable[..., Any])

_KINDS = ("Llama", "Mistral", "Qwen2", "Qwen3")
_DTYPES = (torch.float32, torch.bfloat16)
_ROOMS = 8  # numbers of rows for which room is kept


class _Input(NamedTuple):
    """What layers are given, (rows, 1, width): in the model's dtype and in float32, as tensors and as arrays."""

    given: Tensor
    wide: Tensor
    out: Any
    wide_out: Any


def is_known(model: Any) -> bool:
    """Whether a model is a decoder of a kind that `DecoderStep` takes."""
    name = next((kind for kind in _KINDS if type(model).__name__ == f"{kind}ForCausalLM"), None)
    if name is None or not type(model).__module__.startswith("transformers."):
        return False
    decoder = model.model
    blocks = {type(block).__name__ for block in decoder.layers}
    norms = [module for module in decoder.modules() if type(module).__name__ == f"{name}RMSNorm"]
    kept = {parameter.dtype for parameter in chain(*(norm.parameters() for norm in norms))}
    silent = getattr(model.config, "hidden_act", "") == "silu"
    return blocks == {f"{name}DecoderLayer"} and len(kept) == 1 and kept <= {*_DTYPES} and silent


class DecoderStep:
    """The step of one model; any number of threads may take it at once."""

    def __init__(self, model: Any) -> None:
        """To be made of a model that `is_known`.

        Raises:
            ImportError: numba is not installed.
        """
        from lora_rt.core.engine import kernels

        kernels.prepare()
        self._kernels = kernels
        self._model = model
        self._blocks = list(model.model.layers)
        self._dtype: torch.dtype = model.model.norm.weight.dtype
        self._rooms: dict[int, list[_Room]] = {}
        inner = [(b, b.self_attn, b.mlp, b.input_layernorm, b.post_attention_layernorm) for b in self._blocks]
        self._passed_by: list[nn.Module] = [model, model.model, model.model.norm, *chain(*inner)]
        self._passed_by += [norm for b in self._blocks for norm in _head_norms(b.self_attn)]

    @property
    def watched(self) -> bool:
        """Whether somebody watches or replaces what it passes by."""
        return any("forward" in vars(module) or _watched(module) for module in self._passed_by)

    def can(self, cache: Any) -> bool:
        """Whether the next step may be this one."""
        current = running_pass()
        if self.watched or torch.is_grad_enabled() or (current is not None and current.twins):
            return False
        return all(type(layer) is GrowingLayer for layer in cache.layers)

    def __call__(self, ids: Tensor, positions: Tensor, mask: Tensor, cache: Any) -> Tensor:
        """The logits (rows, 1, vocab) of one more token each.

        Args:
            ids, positions: (rows, 1).
            mask: (rows, columns), 0 where a row does not look; the last column is the token's own.
            cache: of the tokens before, which is extended.
        """
        rows = len(ids)
        rooms = self._rooms.pop(rows, [])
        room = rooms.pop() if rooms else _Room(self._blocks, rows, self._dtype)
        logits = self._stepped(room, ids, positions, mask, cache)
        self._rooms[rows] = [*self._rooms.get(rows, []), room]
        while len(self._rooms) > _ROOMS:
            self._rooms.pop(next(iter(self._rooms)), None)
        return logits

    def _stepped(self, room: _Room, ids: Tensor, positions: Tensor, mask: Tensor, cache: Any) -> Tensor:
        k, decoder = self._kernels, self._model.model
        embedded = decoder.embed_tokens(ids)
        x = _array(embedded.to(self._dtype, copy=True))  # (rows, 1, H); the blocks add to it
        cos, sin = (_array(factors) for factors in decoder.rotary_emb(embedded, positions))  # (rows or 1, 1, D)
        seen = mask.bool().numpy()
        if isinstance(current := running_pass(), SharedPass):
            current.use(k)
        added: Tensor | None = None  # what the layers before have made, which x still lacks
        for number, block in enumerate(self._blocks):
            attention, mlp = block.self_attn, block.mlp
            to_heads, to_o, to_gate, to_down = room.inputs[number]
            self._norm(block.input_layernorm, x, added, to_heads)
            query, key, value = (_sum(getattr(attention, name), to_heads) for name in ("q_proj", "k_proj", "v_proj"))
            for norm, of in zip(_head_norms(attention), (query, key), strict=False):
                k.head_norm(_array(of), _array(norm.weight), norm.variance_epsilon, x)
            k.rotate(_array(query), cos, sin, room.query)
            new = torch.empty(room.keys, dtype=self._dtype)
            k.rotate(_array(key), cos, sin, _array(new))
            keys, values = cache.layers[number].update(new, value.to(self._dtype).view(room.keys))
            if keys.shape[2] != seen.shape[1]:  # what lies beyond would be read as it is
                raise ValueError(f"a mask of {seen.shape[1]} columns for {keys.shape[2]} that are kept")
            steps = (keys.shape[1], *keys.stride()[:3], *values.stride()[:3])
            k.attend(room.query, _flat(keys), _flat(values), steps, seen, attention.scaling, to_o.out, to_o.wide_out)
            self._norm(block.post_attention_layernorm, x, _sum(attention.o_proj, to_o), to_gate)
            gate, up = _sum(mlp.gate_proj, to_gate), _sum(mlp.up_proj, to_gate)
            k.silu_gated(_array(gate), _array(up), to_down.out, to_down.wide_out)
            added = _sum(mlp.down_proj, to_down)
        self._norm(decoder.norm, x, added, room.last)
        logits: Tensor = self._model.lm_head(room.last.given)
        return logits

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

    def __init__(self, blocks: list[Any], rows: int, dtype: torch.dtype) -> None:
        attention, mlp = blocks[0].self_attn, blocks[0].mlp
        size = attention.head_dim
        heads, keys = attention.q_proj.out_features // size, attention.k_proj.out_features // size
        hidden = attention.q_proj.in_features
        self.keys = rows, keys, 1, size
        self.query = _array(torch.empty(rows, heads, 1, size, dtype=dtype))
        memory = [
            (torch.empty(rows, 1, width, dtype=dtype), torch.empty(rows, 1, width))
            for width in (hidden, heads * size, hidden, mlp.gate_proj.out_features)
        ]
        self.inputs = [[_input(*pair) for pair in memory] for _ in blocks]
        self.last = _input(*memory[0])


def _input(given: Tensor, wide: Tensor) -> _Input:
    """The same memory by new tensors."""
    given, wide = given.view_as(given), wide.view_as(wide)
    return _Input(given, wide, _array(given), _array(wide))


def _sum(layer: nn.Module, given: _Input) -> Tensor:
    return unrounded(layer, given.given, given.wide)


def _head_norms(attention: Any) -> tuple[Any, ...]:
    """Qwen 3's norms of each head of queries and of keys."""
    norms = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return tuple(norm for norm in norms if norm is not None)


def silent(hook: Hook) -> Hook:
    """Mark a hook as one that does nothing in a pass that may be stepped here."""
    hook.silent = True  # type: ignore[attr-defined]
    return hook


def _watched(module: nn.Module) -> bool:
    """Whether somebody wants to be told of the module's passes."""
    hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    return any(not getattr(hook, "silent", False) for hook in hooks)


def _array(tensor: Tensor) -> Any:
    """The tensor's memory as numpy sees it: the bits of bfloat16 as uint16."""
    tensor = tensor.detach()
    return tensor.view(torch.uint16).numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy()


def _flat(kept: Tensor) -> Any:
    """All memory between the first and the last number of keys or values, (numbers,)."""
    last = sum((length - 1) * step for length, step in zip(kept.shape, kept.stride(), strict=True))
    return _array(kept.as_strided((last + 1,), (1,)))
