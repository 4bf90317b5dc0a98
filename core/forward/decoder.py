"""A decoding step of a Llama-like decoder on a CPU: its layers multiply, and `kernels.py` does what lies between them.

    x (rows, 1, H)                    what a block is given and adds to
    norm -> q, k, v -> rope, cache -> attention -> o, added
    norm -> gate, up -> silu(gate) * up -> down, added

By blocks, layers are multiplied as the model multiplies them, with all that a running pass adds; over 4-bit weights a
step is one call where it can be (`whole_step.py`). Keys and values go into the model's own cache, so a step may be this
one and the next one the model's. Models are told by the names of their classes in transformers, and each is tried once
before it is stepped so, in one call where that is meant to be.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from lora_rt.core.engine.lanes import LanePass
from lora_rt.core.engine.plan import running_pass
from lora_rt.core.engine.shared import SharedPass
from lora_rt.core.engine.site import unrounded
from lora_rt.core.forward.growing_cache import GrowingLayer
from lora_rt.core.forward.unchanged import (
    Parameters,
    Place,
    dtype_of,
    have_hooks,
    is_on_cpu,
    own,
    place_in,
    shape_of,
    stand,
    steps_of,
)
from lora_rt.core.multiply.ways import is_vector
from lora_rt.core.native import compiled

Hook = TypeVar("Hook", bound=Callable[..., Any])

_log = logging.getLogger("lora_rt.engine")

_KINDS = ("Llama", "Mistral", "Qwen2", "Qwen3")
_DTYPES = (torch.float32, torch.bfloat16)
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


def is_known(model: Any) -> bool:
    """Whether a model is a decoder of a kind that `DecoderStep` takes, all of its parts transformers' own."""
    name = next((kind for kind in _KINDS if type(model).__name__ == f"{kind}ForCausalLM"), None)
    if name is None or not _is_transformers(model) or getattr(model.config, "hidden_act", "") != "silu":
        return False
    kinds = ("ForCausalLM", "Model", "DecoderLayer", "Attention", "MLP", "RMSNorm")
    parts = _parts(model)
    if {type(part).__name__ for part in parts} != {*(name + kind for kind in kinds), "SiLUActivation"}:
        return False
    sizes = {_sizes(block) for block in model.model.layers}
    dtypes = {part.weight.dtype for part in parts if hasattr(part, "variance_epsilon")}
    return all(map(_is_transformers, parts)) and len(sizes) == len(dtypes) == 1 and dtypes <= {*_DTYPES}


def is_watched(model: Any) -> bool:
    """Whether somebody watches or replaces a part that `DecoderStep` passes by."""
    return _are_watched(_parts(model))


def _are_watched(parts: Sequence[Any]) -> bool:
    hooked: bool = _has_any_global_hook()  # type: ignore[no-untyped-call]  # torch's
    if hooked or any(forward is not None for forward in own(parts, "forward")):
        return True
    return have_hooks(parts) and any(map(_watched, parts))


def _parts(model: Any) -> list[Any]:
    """What is passed by: all modules but embedding, rope, linear layers and output head."""
    return [model, *(place.module for place in _places(model) if not isinstance(place.module, nn.ModuleList))]


def _places(model: Any) -> list[Place]:
    """Where a model keeps them, and the list of its blocks."""
    inner = model._modules["model"]
    found = [place_in(model, "model"), place_in(inner, "norm"), place_in(inner, "layers")]
    for number, block in inner._modules["layers"]._modules.items():
        attention, mlp = block._modules["self_attn"], block._modules["mlp"]
        found += [place_in(inner._modules["layers"], number), place_in(block, "self_attn"), place_in(block, "mlp")]
        found += [
            place_in(mlp, "act_fn"),
            place_in(block, "input_layernorm"),
            place_in(block, "post_attention_layernorm"),
        ]
        found += [place_in(attention, name) for name in ("q_norm", "k_norm") if name in attention._modules]
    return found


def _is_transformers(part: Any) -> bool:
    """Whether a module is computed as transformers computes it, whatever else has been put into its class."""
    forward = inspect.unwrap(type(part).forward)
    return all(getattr(one, "__module__", "").startswith("transformers.") for one in (type(part), forward))


def _sizes(block: Any) -> tuple[int, ...]:
    """Everything that the memory of a step hangs on."""
    attention, mlp = block.self_attn, block.mlp
    layers = [attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj]
    layers += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    norms = [block.input_layernorm, block.post_attention_layernorm, *_head_norms(attention)]
    features = [size for layer in layers for size in (layer.in_features, layer.out_features)]
    return attention.head_dim, *features, *(len(norm.weight) for norm in norms)


def can_be_one_call(model: Any) -> bool:
    """Whether its steps are made in one call, where all its layers are multiplied by the 4-bit kernel."""
    try:
        return compiled.is_there() and is_known(model)
    except (AttributeError, KeyError):  # somebody has put parts of another shape into it
        return False


class DecoderStep:
    """The step of one model; any number of threads may take it at once."""

    def __init__(self, model: Any) -> None:
        """To be made of a model that `is_known`.

        Raises:
            ImportError: numba is not installed.
        """
        from lora_rt.core.forward import kernels

        kernels.prepare()
        self._kernels = kernels
        self.whole: Any = None
        try:
            from lora_rt.core.forward.whole_step import WholeStep

            self.whole = WholeStep(model, model.model.norm.weight.dtype)
        except Exception as error:  # another release of numba may lack what it stands on
            _log.warning("steps are made block by block, which is slower: %s", error)
        self._model = model
        self._dtype: torch.dtype = model.model.norm.weight.dtype
        self._rooms: dict[int, _Room] = {}  # by the number of rows; who uses one takes it out
        attention = model.model.layers[0].self_attn
        self._size: int = attention.head_dim
        self._keys = attention.k_proj.out_features // self._size
        self._hidden: int = attention.q_proj.in_features
        self._parts, self._places, self._blocks = _parts(model), _places(model), len(model.model.layers)
        # One more block or norm of heads would be looked at by nobody else.
        self._owners = [model.model.layers._modules, *(block.self_attn._modules for block in model.model.layers)]
        self._owned = sum(map(len, self._owners))
        of_heads = {id(norm) for block in model.model.layers for norm in _head_norms(block.self_attn)}
        norms = [part for part in self._parts if hasattr(part, "variance_epsilon")]
        self._norms = [(norm, self._size if id(norm) in of_heads else self._hidden) for norm in norms]
        self._vectors: Parameters | None = None  # of the norms, while they are what loops read
        self._forwards: dict[Any, Any] = dict.fromkeys(map(type, self._parts))
        for kind in self._forwards:
            self._forwards[kind] = kind.forward

    def can(self, cache: Any) -> bool:
        """Whether the next step may be this one: nothing of the model has been replaced, and no pass replaces it."""
        current = running_pass()
        if torch.is_grad_enabled() or (current is not None and current.twins):
            return False
        same = stand(self._places) and sum(map(len, self._owners)) == self._owned and not _are_watched(self._parts)
        same = same and all(kind.forward is forward for kind, forward in self._forwards.items())
        return same and self._are_vectors() and self._is_own(cache)

    def _are_vectors(self) -> bool:
        """Whether the norms' weights are as long as they have to be; a shorter one would be read beyond its end."""
        known = self._vectors
        if known is not None and known.stand():
            return True
        vectors = Parameters([norm for norm, _ in self._norms], "weight")
        fit = all(is_vector(norm._parameters.get("weight"), size, self._dtype) for norm, size in self._norms)
        self._vectors = vectors if fit else None
        return fit

    def _is_own(self, cache: Any) -> bool:
        """Whether a cache is an empty one, or holds keys and values of this model, of all blocks alike."""
        layers = cache.layers
        if len(layers) != self._blocks or {*map(type, layers)} != {GrowingLayer}:
            return False
        begun = {*map(attrgetter("is_initialized"), layers)}
        if begun != {True}:
            return begun == {False}
        kept = [*map(attrgetter("keys"), layers), *map(attrgetter("values"), layers)]
        shape, *others = {*map(shape_of, kept)}
        if others or len(shape) != 4 or (shape[1], shape[3]) != (self._keys, self._size):
            return False
        return {*map(dtype_of, kept)} == {self._dtype} and all(map(is_on_cpu, kept)) and steps_of(kept, 3) == {1}

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
        decoder = self._model.model
        embedded = decoder.embed_tokens(ids)
        ropes = decoder.rotary_emb(embedded, positions)  # (rows or 1, 1, D) both
        ropes_of = {part.shape for part in ropes}
        fit = ropes_of in ({(rows, 1, self._size)}, {(1, 1, self._size)})
        if not fit or embedded.shape != (rows, 1, self._hidden):
            raise ValueError(f"rope factors of {ropes_of} and embeddings of {tuple(embedded.shape)} for {rows} rows")
        given = embedded.to(self._dtype, copy=True), *ropes
        current = running_pass()
        if self.whole is not None and (current is None or isinstance(current, (SharedPass, LanePass))):
            plan = (None, None) if current is None else (current.topology, current.few(self._kernels))
            ready = self.whole.ready(rows, *plan)
            if ready is not None:
                found: Tensor = self.whole(*given, mask, cache, ready)
                return found
        room = self._rooms.pop(rows, None) or _Room(self._model.model.layers, rows, self._dtype)
        logits = self._stepped(room, given, mask, cache)
        self._rooms[rows] = room
        for number in list(self._rooms)[:-_ROOMS]:
            self._rooms.pop(number, None)
        return logits

    def _stepped(self, room: _Room, given: Sequence[Tensor], mask: Tensor, cache: Any) -> Tensor:
        k, decoder = self._kernels, self._model.model
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
            for norm, of in zip(_head_norms(attention), (query, key), strict=False):
                k.head_norm(_array(of), _array(norm.weight), norm.variance_epsilon, x)
            k.rotate(_array(query), cos, sin, room.query)
            new = torch.empty(room.keys.shape, dtype=self._dtype, device="cpu")
            k.rotate(_array(key), cos, sin, _array(new))
            keys, values = cache.layers[number].update(new, value.to(self._dtype).view(room.keys.shape))
            steps = (keys.shape[1], *keys.stride()[:3], *values.stride()[:3])
            k.attend(room.query, _flat(keys), _flat(values), steps, seen, attention.scaling, to_o.out, to_o.wide_out)
            self._norm(block.post_attention_layernorm, x, self._sum(attention.o_proj, to_o, to_gate), to_gate)
            gate, up = self._sum(mlp.gate_proj, to_gate, to_down), self._sum(mlp.up_proj, to_gate, to_down)
            k.silu_gated(_array(gate), _array(up), to_down.out, to_down.wide_out)
            added = self._sum(mlp.down_proj, to_down, to_heads)
        self._norm(decoder.norm, x, added, room.last)
        logits: Tensor = self._model.lm_head(room.last.given.clone())  # whoever watches may keep what it is given
        return logits

    def _sum(self, layer: nn.Module, given: _Input, like: _Input | _Keys) -> Tensor:
        """What a layer makes of its input, (rows, 1, width): as wide as what is made of it, or memory would be torn."""
        found = unrounded(layer, given.given, given.wide)
        if found.shape != like.given.shape:
            raise ValueError(f"a layer gives {tuple(found.shape)} where {tuple(like.given.shape)} is wanted")
        return found if found.dtype in (torch.float32, self._dtype) else found.to(self._dtype)

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

    def __init__(self, blocks: Any, rows: int, dtype: torch.dtype) -> None:
        attention, mlp = blocks[0].self_attn, blocks[0].mlp
        size = attention.head_dim
        heads, keys = attention.q_proj.out_features // size, attention.k_proj.out_features // size
        hidden = attention.q_proj.in_features
        self.keys = _Keys((rows, keys, 1, size), torch.empty(rows, 1, keys * size, dtype=dtype, device="cpu"))
        self.query = _array(torch.empty(rows, heads, 1, size, dtype=dtype, device="cpu"))
        memory = [
            (torch.empty(rows, 1, width, dtype=dtype), torch.empty(rows, 1, width, dtype=torch.float32))
            for width in (hidden, heads * size, hidden, mlp.gate_proj.out_features)
        ]
        self.inputs = [[_input(*pair) for pair in memory] for _ in blocks]
        self.last = _input(*memory[0])


def _input(given: Tensor, wide: Tensor) -> _Input:
    """The same memory by new tensors."""
    given, wide = given.view_as(given), wide.view_as(wide)
    return _Input(given, wide, _array(given), _array(wide))


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
    if not (module._forward_hooks or module._forward_pre_hooks):
        return False
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
