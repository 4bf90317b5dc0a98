"""Llama-like decoders of transformers whose passes are made by their blocks on a CPU, past the modules' own forwards.

Layers are multiplied as the model multiplies them, with all that a running pass adds; what lies between them is made in
loops of ours. Models are told by the names of their classes in transformers, and each is tried once before it is passed
so. Keys and values go into the model's own cache, so one pass may be ours and the next one the model's.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from operator import attrgetter
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook

from lora_rt.core.engine.plan import running_pass
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

Hook = TypeVar("Hook", bound=Callable[..., Any])

_KINDS = ("Llama", "Mistral", "Qwen2", "Qwen3")
_DTYPES = (torch.float32, torch.bfloat16)


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
    norms = [block.input_layernorm, block.post_attention_layernorm, *head_norms(attention)]
    features = [size for layer in layers for size in (layer.in_features, layer.out_features)]
    return attention.head_dim, *features, *(len(norm.weight) for norm in norms)


def can_be_one_call(model: Any) -> bool:
    """Whether its steps are made in one call, where all its layers are multiplied by the 4-bit kernel."""
    try:
        return is_known(model)
    except (AttributeError, KeyError):  # somebody has put parts of another shape into it
        return False


class Decoder:
    """One model of these, and whether it still is what it was when this was made."""

    def __init__(self, model: Any) -> None:
        """To be made of a model that `is_known`."""
        self.model = model
        self.dtype: torch.dtype = model.model.norm.weight.dtype
        attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
        self.size: int = attention.head_dim
        self.heads: int = attention.q_proj.out_features // self.size
        self.keys: int = attention.k_proj.out_features // self.size  # heads of keys and values
        self.hidden: int = attention.q_proj.in_features
        self.width: int = mlp.gate_proj.out_features
        self._parts, self._places, self._blocks = _parts(model), _places(model), len(model.model.layers)
        # One more block or norm of heads would be looked at by nobody else.
        self._owners = [model.model.layers._modules, *(block.self_attn._modules for block in model.model.layers)]
        self._owned = sum(map(len, self._owners))
        of_heads = {id(norm) for block in model.model.layers for norm in head_norms(block.self_attn)}
        norms = [part for part in self._parts if hasattr(part, "variance_epsilon")]
        self._norms = [(norm, self.size if id(norm) in of_heads else self.hidden) for norm in norms]
        self._vectors: Parameters | None = None  # of the norms, while they are what loops read
        self._forwards: dict[Any, Any] = dict.fromkeys(map(type, self._parts))
        for kind in self._forwards:
            self._forwards[kind] = kind.forward

    def can(self, cache: Any) -> bool:
        """Whether the next pass may be ours: nothing of the model has been replaced, and no pass replaces it.

        Args:
            cache: that the pass extends, or None.
        """
        current = running_pass()
        if torch.is_grad_enabled() or (current is not None and current.twins):
            return False
        same = stand(self._places) and sum(map(len, self._owners)) == self._owned and not _are_watched(self._parts)
        same = same and all(kind.forward is forward for kind, forward in self._forwards.items())
        return same and self._are_vectors() and (cache is None or self._is_own(cache))

    def _are_vectors(self) -> bool:
        """Whether the norms' weights are as long as they have to be; a shorter one would be read beyond its end."""
        known = self._vectors
        if known is not None and known.stand():
            return True
        vectors = Parameters([norm for norm, _ in self._norms], "weight")
        fit = all(is_vector(norm._parameters.get("weight"), size, self.dtype) for norm, size in self._norms)
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
        if others or len(shape) != 4 or (shape[1], shape[3]) != (self.keys, self.size):
            return False
        return {*map(dtype_of, kept)} == {self.dtype} and all(map(is_on_cpu, kept)) and steps_of(kept, 3) == {1}


def head_norms(attention: Any) -> tuple[Any, ...]:
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
