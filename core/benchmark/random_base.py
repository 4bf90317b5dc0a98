"""Bases with random weights in the shape of well-known ones: a GPU is measured without any download.

Built layer by layer: the modules stand on the meta device, and each weight is made and quantized before the next, so
that the peak is the quantized model and one dense layer.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_rt.core.base.byte_tokenizer import byte_tokenizer
from lora_rt.core.base.load import LoadedBase, base_facts
from lora_rt.core.base.precision import Precision, check_precision, choose_device, compute_dtype
from lora_rt.core.base.repacking import forbid_uneven_repacking
from lora_rt.core.base.silence import libraries_silenced
from lora_rt.core.benchmark.workloads import SIZES, refuse_unknown
from lora_rt.registry.card import BaseIdentity

_SCALE = 0.02  # of weights, as transformers initializes these models
_SHAPE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
_SHAPES = {
    "tiny": (1024, 64, 128, 2, 4, 2, 4096),
    "7b": (32000, 4096, 14336, 32, 32, 8, 32768),  # mistralai/Mistral-7B-v0.1; no workload reaches its sliding window
    "13b": (32000, 5120, 13824, 40, 40, 40, 4096),  # meta-llama/Llama-2-13b
}


def random_base(size: str, precision: str = "int4", device: str = "auto") -> LoadedBase:
    """A base of that size: "7b" as Mistral 7B, "13b" as Llama 2 13B, "tiny" for a look at the command.

    Raises:
        LoraRtError: there is no such size, precision or device.
    """
    refuse_unknown("random base", [] if size in SIZES else [size], SIZES)
    chosen = check_precision(precision)
    target = choose_device(device, chosen)
    dtype = compute_dtype(chosen)
    with libraries_silenced():
        model = _materialized(_config(size), chosen, target, dtype)
    forbid_uneven_repacking(model)
    identity = BaseIdentity(id=f"random-{size}", revision=None, digest="")
    return LoadedBase(
        model=model,
        tokenizer=byte_tokenizer(("<pad>", "<s>", "</s>"), pad_token="<pad>", bos_token="<s>", eos_token="</s>"),
        identity=identity,
        facts=base_facts(model, identity, chosen),
        folder=Path(tempfile.gettempdir()),
        precision=chosen,
        device=target,
        dtype=dtype,
    )


def _config(size: str) -> Any:
    from transformers import LlamaConfig, MistralConfig

    shape = dict(zip(_SHAPE, _SHAPES[size], strict=True))
    return MistralConfig(**shape, sliding_window=None) if size == "7b" else LlamaConfig(**shape)


def _materialized(config: Any, precision: Precision, device: torch.device, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator(device).manual_seed(0)
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            weight = _random(tuple(module.weight.shape), generator, device, dtype)
            model.set_submodule(name, _linear(weight, precision, dtype))
            del weight
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            parent, _, leaf = name.rpartition(".")
            norm = parameter.dim() == 1
            made = torch.ones(parameter.shape, device=device, dtype=dtype) if norm else None
            value = _random(tuple(parameter.shape), generator, device, dtype) if made is None else made
            setattr(model.get_submodule(parent), leaf, nn.Parameter(value, requires_grad=False))
    rotary = model.model.rotary_emb  # its frequencies are computed, not loaded
    model.model.rotary_emb = type(rotary)(config=config).to(device)
    model.requires_grad_(False)
    return model.eval()


def _random(
    shape: tuple[int, ...], generator: torch.Generator, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    return torch.empty(shape, device=device, dtype=dtype).normal_(0, _SCALE, generator=generator)


def _linear(weight: torch.Tensor, precision: Precision, dtype: torch.dtype) -> nn.Module:
    """A linear layer of that weight (out, in); bitsandbytes quantizes it when it is moved to its device."""
    import bitsandbytes as bnb

    out, inner = weight.shape
    if precision == "int4":
        four = bnb.nn.Linear4bit(inner, out, False, compute_dtype=dtype, quant_type="nf4", device="meta")
        four.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", compress_statistics=True)
        return four.to(weight.device)  # type: ignore[no-any-return]
    if precision == "int8":
        eight = bnb.nn.Linear8bitLt(inner, out, False, has_fp16_weights=False, device="meta")
        eight.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        return eight.to(weight.device)  # type: ignore[no-any-return]
    plain = nn.Linear(inner, out, False, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    return plain
