"""What a base takes of other libraries beyond their documented faces; `tests/base/test_upstream.py` holds each fact.

transformers
_is_stateful                     a model that keeps more of the tokens that it has read than keys and values
AutoHfQuantizer                  its own replacement of layers, without weights
_attn_implementation             of a configuration: the name of the function that its model attends with
_can_set_attn_implementation     whether another function can be named
_name_or_path, _commit_hash      of a configuration: which repository or folder it was read from, at which commit
_apply_gate                      of fused experts: what lies between their two products
modeling_gguf_pytorch_utils      its reader of GGUF files has tqdm's bar, without a switch

torch
_parameters, _buffers            the dictionaries in which a module keeps its own
_orig_mod, _compiled_call_impl   the module that torch.compile has wrapped; what `module.compile()` calls in its place

accelerate
_hf_hook                         of a module that it moves or offloads
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


def keeps_a_state(model: Any) -> bool:
    """Whether the model has a recurrent state, which no cache of keys and values holds."""
    return bool(getattr(model, "_is_stateful", False))


def quantize_layers(model: Any, how: Any) -> None:
    """Replace the layers of a model on the meta device by those of a transformers quantization configuration."""
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(how, pre_quantized=True)
    quantizer.preprocess_model(model, device_map=None)
    quantizer.postprocess_model(model)


def attention_of(config: Any) -> str | None:
    """What a model of this configuration attends with: "sdpa", "eager", a name that was registered; None for unsaid."""
    found: str | None = getattr(config, "_attn_implementation", None)
    return found


def forget_attention(config: Any) -> None:
    """Let transformers choose what a model of this configuration attends with."""
    config._attn_implementation = None


def can_attend_otherwise(model: Any) -> bool:
    """Whether a model takes attention functions by their names."""
    return bool(model._can_set_attn_implementation())


def origin_of(config: Any) -> tuple[str, str | None]:
    """The repository or folder that a configuration was read from, and the commit; empty and None for unsaid."""
    return str(getattr(config, "_name_or_path", "") or ""), getattr(config, "_commit_hash", None)


def gated(experts: Any, first: Tensor) -> Tensor:
    """What fused experts make of their first product, for the second one."""
    found: Tensor = experts._apply_gate(first)
    return found


@contextmanager
def gguf_bar_hidden() -> Iterator[None]:
    """Read GGUF files without a bar within the block."""
    from transformers import modeling_gguf_pytorch_utils as reader

    bar = reader.tqdm
    reader.tqdm = functools.partial(bar, disable=True)
    try:
        yield
    finally:
        reader.tqdm = bar


def own_tensors(module: nn.Module) -> tuple[dict[str, nn.Parameter | None], dict[str, Tensor | None]]:
    """A module's own parameters and buffers by name; what is put in there is the module's."""
    return module._parameters, module._buffers


def uncompiled(model: Any) -> Any:
    """The model itself, or the one that torch.compile has wrapped."""
    return getattr(model, "_orig_mod", model)


def compiled_call(module: nn.Module) -> Any:
    """What `module.compile()` has put in the place of its forward pass; None for nothing."""
    return vars(module).get("_compiled_call_impl")


def set_compiled_call(module: nn.Module, call: Any) -> None:
    """Put that back, or None, which takes it away."""
    module._compiled_call_impl = call


def device_hook(module: Any) -> Any:
    """What accelerate has put around a module that it moves or offloads; None for nothing."""
    return getattr(module, "_hf_hook", None)
