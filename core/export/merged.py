"""A composition added to the dense base: an ordinary transformers folder that needs no adapter any more.

Every adapted weight is added up in float32 and rounded once, to the dtype that is saved.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lora_rt.core.base.prepare import prepare_base
from lora_rt.core.base.progress import step
from lora_rt.core.base.reading import readable, whole_model, whole_tokenizer
from lora_rt.core.base.silence import libraries_silenced
from lora_rt.core.engine.stack import Factors
from lora_rt.core.export import ExportError
from lora_rt.core.export.combine import refuse_overflow
from lora_rt.core.export.outline import Outline


def write_merged(folder: Path, factors: Mapping[str, Factors], base: Outline, dtype: torch.dtype) -> None:
    """Write model, tokenizer and generation configuration.

    Args:
        folder: exists and is empty.
        factors: by module path, in float32.
        base: the outline of the base; its dense weights are read here.
        dtype: float32, float16 or bfloat16.

    Raises:
        ExportError: the disk has no room, the base is quantized, or it has no place for a bias.
        BaseError: the base can't be read.
    """
    _refuse_quantized(base)
    _refuse_full_disk(folder, base, dtype)
    dense = prepare_base(base.source, "float32").folder
    with libraries_silenced(), step(f"merging into {base.identity.id}"):
        with readable(f"{dense} can't be loaded", "Fetch the model again"):
            model = whole_model(dense, dtype="auto")
            tokenizer = whole_tokenizer(dense)
        merge(model, factors, dtype)
        model.to(dtype).save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def merge(model: Any, factors: Mapping[str, Factors], dtype: torch.dtype) -> None:
    """Add the factors to a dense model's weights, in place; what was added to is in `dtype` afterwards.

    Raises:
        ExportError: a layer has no bias to add one to, or sums that the dtype can't hold; all layers are named.
    """
    _refuse_biases(model, factors)
    sums: list[tuple[str, Tensor]] = []
    with torch.no_grad():
        for name, item in factors.items():
            module = model.get_submodule(name)
            _untie(model, module)
            delta = item.b @ item.a  # (out, in)
            module.weight.data = _sum(module.weight, delta if isinstance(module, nn.Linear) else delta.T, dtype)
            sums.append((name, module.weight.data))
            if item.bias is not None:
                module.bias.data = _sum(module.bias, item.bias, dtype)
                sums.append((name, module.bias.data))
    refuse_overflow(sums, dtype)


def _sum(weight: Tensor, change: Tensor, dtype: torch.dtype) -> Tensor:
    return (weight.float() + change).to(dtype)


def _untie(model: Any, module: nn.Module) -> None:
    """An output head that shares the embedding's weight gets one of its own: the embedding is not to change."""
    embedding = model.get_input_embeddings()
    if module is model.get_output_embeddings() and module.weight is embedding.weight:
        module.weight = nn.Parameter(module.weight.detach().clone(), requires_grad=False)
        model.config.get_text_config().tie_word_embeddings = False
        model.config.tie_word_embeddings = False


def _refuse_biases(model: Any, factors: Mapping[str, Factors]) -> None:
    lacking = [n for n, item in factors.items() if item.bias is not None and model.get_submodule(n).bias is None]
    if lacking:
        raise ExportError(
            f"the adapters have biases at {len(lacking)} layers where the base has none",
            next_step="Use --format peft",
            problems=lacking,
        )


def _refuse_quantized(base: Outline) -> None:
    # The default base and GGUF files are dequantized; a folder that is quantized already has lost its dense weights.
    if base.source.kind in ("folder", "hub") and getattr(base.config, "quantization_config", None):
        raise ExportError(
            f"{base.identity.id} is quantized, and merging needs dense weights",
            next_step="Give a dense copy with --base",
        )


def _refuse_full_disk(folder: Path, base: Outline, dtype: torch.dtype) -> None:
    needed, free = base.parameters * dtype.itemsize, shutil.disk_usage(folder).free
    if needed > free:
        raise ExportError(
            f"the merged model takes {needed / 1e9:.1f} GB and {folder.parent} has {free / 1e9:.1f} GB left",
            next_step="Free some space, or give a folder on another disk with -o",
        )
