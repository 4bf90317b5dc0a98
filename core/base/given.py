"""A model that a caller has loaded: taken as it is, whatever its layers are, and given back as it was."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn

from lora_rt.core.base.identity import identify
from lora_rt.core.base.load import LoadedBase, base_facts, compute_dtype_of
from lora_rt.core.base.precision import precision_of
from lora_rt.core.base.shape import device_of
from lora_rt.core.base.source import BaseError, parse_base
from lora_rt.core.base.upstream import (
    compiled_call,
    device_hook,
    origin_of,
    own_tensors,
    set_compiled_call,
    uncompiled,
)
from lora_rt.registry.card import BaseIdentity

_REPACKS = "support_avx512bf16_for_cpu"
_HOW = "Give what AutoModelForCausalLM.from_pretrained() returns, and its tokenizer"


def given_base(model: Any, tokenizer: Any, base_id: str | None = None) -> LoadedBase:
    """A loaded model as a base. It is put into eval mode until the base is given back.

    Args:
        model: a causal language model of transformers, or PEFT's or torch.compile's around one.
        tokenizer: its tokenizer, or the processor that holds it.
        base_id: which base it is, as `--base` would say it; what the model itself says where left out.

    Raises:
        BaseError: it is no such model, or not one that can be used as it stands.
    """
    inner = _causal_model(model)
    words = getattr(tokenizer, "tokenizer", tokenizer)
    if not callable(words) or not hasattr(words, "eos_token_id"):
        raise BaseError(f"{type(tokenizer).__name__} is not a tokenizer of transformers", next_step=_HOW)
    identity = _identity(inner, base_id)
    precision = precision_of(inner)
    facts = base_facts(inner, identity, precision)
    return LoadedBase(
        model=inner,
        tokenizer=words,
        identity=identity,
        facts=facts,
        folder=Path(str(getattr(inner, "name_or_path", ""))),
        precision=precision,
        device=device_of(inner),
        dtype=compute_dtype_of(inner),
        give_back=_borrow(inner),
    )


def _causal_model(model: Any) -> Any:
    """The model itself, out of what stands around it."""
    inner: Any = uncompiled(model)
    if hasattr(inner, "get_base_model"):  # PEFT's: its adapters stay out of our passes
        _check_unmerged(inner)
        inner = inner.get_base_model()
    parts = ("config", "get_input_embeddings", "get_output_embeddings", "named_modules")
    if not all(hasattr(inner, part) for part in parts):
        raise BaseError(f"{type(model).__name__} is not a model of transformers", next_step=_HOW)
    if getattr(inner.config, "is_encoder_decoder", False) or inner.get_output_embeddings() is None:
        raise BaseError(f"{type(inner).__name__} is not a causal language model", next_step=_HOW)
    if getattr(inner.config, "return_dict", True) is False:
        text = f"{type(inner).__name__} gives tuples (config.return_dict is False)"
        raise BaseError(text, next_step="Set model.config.return_dict = True")
    empty = [name for name, parameter in inner.named_parameters() if parameter.is_meta]
    if empty and not any(device_hook(module) is not None for module in inner.modules()):
        text = f"{len(empty)} weights of {type(inner).__name__} hold nothing (they are on the meta device): {empty[0]}"
        raise BaseError(text, next_step="Load them; device_map lets transformers keep weights on a disk")
    if any(hasattr(parameter, "device_mesh") for parameter in inner.parameters()):
        text = f"{type(inner).__name__} is split over several processes"
        raise BaseError(text, next_step='Load it in one process, with device_map="auto" for several devices')
    return inner


def _check_unmerged(model: nn.Module) -> None:
    merged = [name for name, module in model.named_modules() if getattr(module, "merged_adapters", None)]
    if merged:
        text = f"PEFT has merged adapters into {len(merged)} layers of this model"
        raise BaseError(text, next_step="Call its unmerge_adapter() first, or merge_and_unload() and give the result")


def _identity(model: Any, base_id: str | None) -> BaseIdentity:
    """What the caller says it is; else its name, and no digest: what is in memory may be anything."""
    if base_id is None:
        said, commit = origin_of(model.config)
        said = said.rstrip("/")
        name = Path(said).name if Path(said).is_absolute() or said.startswith(".") else said
        return BaseIdentity(name or type(model).__name__, commit, "")
    source = parse_base(base_id)
    return BaseIdentity(source.text, source.revision, "") if source.kind == "hub" else identify(source)


def _borrow(model: nn.Module) -> Callable[[], None]:
    """Put a model into eval mode by its flags alone; what is returned puts back all that may differ after use."""
    with ExitStack() as undo:
        for module in model.modules():
            if module.training:
                undo.callback(setattr, module, "training", True)
                module.training = False
            if (compiled := compiled_call(module)) is not None:  # it would not see the adapters
                undo.callback(set_compiled_call, module, compiled)
                set_compiled_call(module, None)
            if vars(module).get(_REPACKS):  # repacked weights have no gradient
                undo.callback(setattr, module, _REPACKS, True)
                setattr(module, _REPACKS, False)
            if (grown := vars(module).get("max_seq_len_cached")) is not None:  # rope that grows with its texts
                undo.callback(setattr, module, "max_seq_len_cached", grown)
            for tensors in own_tensors(module):
                if tensors:
                    undo.callback(_put_back, tensors, dict(tensors))
        return undo.pop_all().close


def _put_back(tensors: dict[str, Any], before: dict[str, Any]) -> None:
    """Undo what rope and offloading put into a model in a pass without gradients, where no gradient could follow."""
    for name, tensor in before.items():
        if tensor is not None and (now := tensors.get(name)) is not None and now.is_inference():
            tensors[name] = tensor
