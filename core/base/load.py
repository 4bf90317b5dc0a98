"""Loads a prepared base: weights, tokenizer, and the facts about it that everybody else needs."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lora_rt.core.base.precision import Precision, check_precision, choose_device, compute_dtype
from lora_rt.core.base.prepare import prepare_base
from lora_rt.core.base.progress import step
from lora_rt.core.base.quiet import hush
from lora_rt.core.base.source import BaseError, parse_base
from lora_rt.plugins.contract import BaseFacts
from lora_rt.registry.card import BaseIdentity


@dataclass(frozen=True, slots=True)
class LoadedBase:
    """The model in memory (eval mode, frozen), its tokenizer, and what it is."""

    model: Any
    tokenizer: Any
    identity: BaseIdentity
    facts: BaseFacts
    folder: Path
    precision: Precision
    device: torch.device
    dtype: torch.dtype

    def digest(self) -> str:
        """The sha256 of every parameter and buffer as it lies in memory.

        Not of `state_dict()`: asking bitsandbytes for that repacks 4-bit weights.
        """
        total = hashlib.sha256()
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            total.update(name.encode())
            total.update(tensor.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes() if tensor.dim() else str(tensor.item()).encode())
        return total.hexdigest()


def load_base(text: str = "default", precision: str = "int4", device: str = "auto", *, for_training: bool = False) -> LoadedBase:
    """Load a base.

    Args:
        text: "default", a folder, a GGUF file, or a hub id with an optional @revision.
        precision: float32, bfloat16, float16, int8 or int4.
        device: "auto", "cpu", "cuda" or "cuda:N".
        for_training: keep 4-bit weights in the layout whose matmul has a gradient (see `_keep_gradients`).

    Raises:
        BaseError, PrecisionError: with what to do next.
    """
    chosen = check_precision(precision)
    target = choose_device(device, chosen)
    prepared = prepare_base(parse_base(text), chosen)
    hush()
    with step(f"loading {prepared.identity.id} ({chosen})"):
        model, tokenizer = _read(prepared.folder, chosen, target)
        model.requires_grad_(False)
        model.eval()
        if for_training:
            _keep_gradients(model)
    return LoadedBase(
        model=model,
        tokenizer=tokenizer,
        identity=prepared.identity,
        facts=_facts(model.config, prepared.identity, chosen),
        folder=prepared.folder,
        precision=chosen,
        device=target,
        dtype=compute_dtype(chosen),
    )


def _read(folder: Path, precision: Precision, device: torch.device) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=compute_dtype(precision), device_map={"": device})
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except torch.OutOfMemoryError as error:
        raise BaseError(f"{folder.name} does not fit into the memory of {device}", next_step="Use --precision int4, or a smaller base") from error
    except (ValueError, OSError, KeyError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise BaseError(f"{folder} can't be loaded: {lines[0]}", next_step="Remove that folder and try again, or check that transformers can load it") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _keep_gradients(model: nn.Module) -> None:
    """Forbid bitsandbytes to repack 4-bit weights for its CPU inference kernel, which has no autograd.

    Otherwise the first evaluation in eval mode repacks them, and training goes on without a gradient and without an
    error. Must run before the first forward pass.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _facts(config: Any, identity: BaseIdentity, precision: Precision) -> BaseFacts:
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    hidden = int(text.hidden_size)
    return BaseFacts(
        id=identity.id,
        revision=identity.revision,
        digest=identity.digest,
        precision=precision,
        layers=int(text.num_hidden_layers),
        hidden_size=hidden,
        heads=heads,
        kv_heads=int(getattr(text, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(text, "head_dim", None) or hidden // heads),
        vocab_size=int(text.vocab_size),
    )
