"""Bases with random weights in the shape of well-known ones: a GPU is measured without any download.

Built weight by weight: the modules stand on the meta device, and each weight is made and quantized before the next, so
that the peak is the quantized model and one dense layer.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from lora_rt.core.base.byte_tokenizer import byte_tokenizer
from lora_rt.core.base.choices import check_precision
from lora_rt.core.base.load import LoadedBase, base_facts
from lora_rt.core.base.precision import choose_device, compute_dtype, quantization_config
from lora_rt.core.base.repacking import forbid_uneven_repacking
from lora_rt.core.base.silence import libraries_silenced
from lora_rt.core.base.source import RANDOM, BaseError
from lora_rt.core.base.upstream import quantize_layers
from lora_rt.registry.card import BaseIdentity

_SCALE = 0.02  # of weights, as transformers initializes these models


def random_base(size: str, precision: str = "int4", device: str = "auto") -> LoadedBase:
    """A base of that size: "7b" as Mistral 7B, "13b" as Llama 2 13B, "tiny" for a look at the command.

    Raises:
        LoraRtError: there is no such size, precision or device.
    """
    if size not in RANDOM:
        raise BaseError(f"no random base is called {size!r}", next_step=f"There are: {', '.join(RANDOM)}")
    chosen = check_precision(precision)
    target, dtype = choose_device(device, chosen), compute_dtype(chosen)
    with libraries_silenced():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(_config(size), dtype=dtype)
        if (how := quantization_config(chosen)) is not None:
            quantize_layers(model, how)
        _materialize(model, target, dtype)
    model.requires_grad_(False).eval()
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


def _config(size: str) -> LlamaConfig | MistralConfig:
    if size == "7b":  # mistralai/Mistral-7B-v0.1, as transformers has it; no workload reaches its sliding window
        return MistralConfig(sliding_window=None)
    if size == "13b":  # meta-llama/Llama-2-13b
        large = {"num_hidden_layers": 40, "num_attention_heads": 40, "max_position_embeddings": 4096}
        return LlamaConfig(hidden_size=5120, intermediate_size=13824, **large)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096}
    return LlamaConfig(vocab_size=1024, hidden_size=64, intermediate_size=128, num_hidden_layers=2, **heads)


def _materialize(model: Any, device: torch.device, dtype: torch.dtype) -> None:
    """Norms of one, all else random; bitsandbytes quantizes a weight of its own when that is put on its device."""
    generator = torch.Generator(device).manual_seed(0)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            value: Tensor = torch.ones(parameter.shape, device=device, dtype=dtype)
            if value.dim() > 1:
                value.normal_(0, _SCALE, generator=generator)
            how = vars(parameter)  # of a weight of bitsandbytes, how it is quantized
            if "SCB" in how:
                value = value.cpu()  # 8-bit weights are quantized on their way from the CPU
            setattr(module, name, type(parameter)(value, requires_grad=False, **how).to(device))
    rotary = model.model.rotary_emb  # its frequencies are computed, not loaded
    model.model.rotary_emb = type(rotary)(config=model.config).to(device)
