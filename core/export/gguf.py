"""One adapter as a GGUF file, which llama.cpp (`--lora`) and Ollama (`ADAPTER`) load over a GGUF base.

The format is llama.cpp's (`src/llama-adapter.cpp`): for a weight tensor T of the base there are `T.lora_a` (rank, in)
and `T.lora_b` (out, rank), rows as in the converted base (see `architectures.py`). llama.cpp adds

    scale * alpha / rank * B A x        with the rank of each tensor; without alpha, if that is 0

Our factors have their scaling folded in, so alpha / rank must be 1: alpha is the rank where all tensors share one, and
0 where they do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor

from lora_rt.core.engine.stack import Factors
from lora_rt.core.export import ExportError
from lora_rt.core.export.architectures import architecture_of

_KINDS = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@dataclass(frozen=True, slots=True)
class Place:
    """Where one linear layer lies in a converted model: its tensor, and the order of its rows (None: as they are)."""

    tensor: str
    rows: Tensor | None


def write_gguf_adapter(
    path: Path,
    factors: Mapping[str, Factors],
    config: Any,
    *,
    dtype: torch.dtype = torch.float32,
    name: str = "",
    base: str = "",
    licence: str = "",
) -> None:
    """Write factors as one GGUF adapter.

    Args:
        path: the file, conventionally ending in .gguf; one that is there is overwritten.
        factors: by module path in the base, as `lora_rt.core.requests.reading.read_adapter` gives them: a (rank, in),
            b (out, rank) with every scaling and weight folded in.
        config: the base's transformers configuration (`AutoConfig.from_pretrained(folder)`, `model.config`).
        dtype: float32, float16 or bfloat16.
        name, base, licence: what the file says of itself; left out where empty.

    Raises:
        ExportError: the architecture or a layer has no counterpart in llama.cpp, or the adapter has biases, which the
            format can't hold.
    """
    _refuse_biases(factors)
    architecture, where = _places(config, [(module, item.b.shape[0]) for module, item in factors.items()])
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, _alpha(factors))
    _describe(writer, name, base, licence)
    for module, item in factors.items():
        place = where[module]
        b = item.b if place.rows is None else item.b[place.rows]
        _add(writer, f"{place.tensor}.lora_a", item.a, dtype)
        _add(writer, f"{place.tensor}.lora_b", b, dtype)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _places(config: Any, modules: Iterable[tuple[str, int]]) -> tuple[str, dict[str, Place]]:
    """llama.cpp's name of the architecture, and the place of every module.

    Args:
        config: the base's transformers configuration.
        modules: (path in the base, out_features) of each.

    Raises:
        ExportError: the architecture is not known here, or llama.cpp has no such tensor; all of them are named.
    """
    architecture = architecture_of(config)
    number = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = gguf.get_tensor_name_map(number, int(config.num_hidden_layers))
    found: dict[str, Place] = {}
    problems = []
    for module, out_features in modules:
        tensor = names.get_name(module)
        if tensor is None:
            problems.append(f"{module}: llama.cpp's {architecture.name!r} has no tensor for it")
        elif tensor == "output" and config.tie_word_embeddings:
            problems.append(f"{module}: it is tied to the embedding, and a converted model has no tensor of its own")
        else:
            found[module] = Place(f"{tensor}.weight", architecture.rows(config, module, out_features))
    if problems:
        raise ExportError(
            f"{len(problems)} layers of this composition have no place in a GGUF model",
            next_step="Use --format peft or --format merged",
            problems=problems,
        )
    return architecture.name, found


def _refuse_biases(factors: Mapping[str, Factors]) -> None:
    biased = [f"{module}: it has a bias" for module, item in factors.items() if item.bias is not None]
    if biased:
        raise ExportError(
            f"a GGUF adapter holds no biases, and {len(biased)} layers have one",
            next_step="Use --format peft, or --format merged where these layers of the base have biases",
            problems=biased,
        )


def _alpha(factors: Mapping[str, Factors]) -> float:
    ranks = {item.a.shape[0] for item in factors.values()}
    return float(ranks.pop()) if len(ranks) == 1 else 0.0


def _describe(writer: Any, name: str, base: str, licence: str) -> None:
    if name:
        writer.add_name(name)
    if licence:
        writer.add_license(licence)
    if base:
        writer.add_base_model_count(1)
        writer.add_base_model_name(0, base)


def _add(writer: Any, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    kind = gguf.GGMLQuantizationType[_KINDS[dtype]]
    writer.add_tensor(name, gguf.quantize(tensor.detach().float().cpu().numpy(), kind), raw_dtype=kind)
