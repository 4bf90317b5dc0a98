"""How llama.cpp calls the layers of a model, and in which order it keeps their rows.

llama.cpp rotates neighbouring pairs of a head's features in some architectures, where transformers rotates the first
half against the second; a converted model has the rows of its query and key projections reordered accordingly, and so
must an adapter's B. The facts are those of llama.cpp's converters (`conversion/*.py` in its repository), architecture
by architecture; one that is not in the table is refused, since a wrong order gives a file that loads and is wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_rt.core.base.shape import heads_of
from lora_rt.core.export import ExportError

Rows = Callable[[Any, str, int], Tensor | None]


@dataclass(frozen=True, slots=True)
class Architecture:
    """`name` is llama.cpp's. `rows(config, module, out_features)`: which row of ours is each of llama.cpp's."""

    name: str
    rows: Rows


def architecture_of(config: Any) -> Architecture:
    """The entry of a configuration's model type.

    Raises:
        ExportError: there is none.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ExportError(
            f"GGUF adapters are written for {known}; the base is a {config.model_type}",
            next_step="Use --format peft, or --format merged and convert that with llama.cpp",
        )
    return found


def _as_they_are(config: Any, module: str, out_features: int) -> None:
    return None


def _rotary_pairs(config: Any, module: str, out_features: int) -> Tensor | None:
    """Query and key rows of each head, from [first half | second half] to pairs that lie side by side."""
    leaf = module.rpartition(".")[2]
    if leaf not in ("q_proj", "k_proj"):
        return None
    own = heads_of(config)
    heads = own.queries if leaf == "q_proj" else own.keys
    return torch.arange(out_features).reshape(heads, 2, -1).transpose(1, 2).flatten()


def _whole_projections(config: Any, module: str, out_features: int) -> Tensor | None:
    """GPT-NeoX keeps [q k v] of each head; llama.cpp all of q, then all of k, then all of v."""
    if not module.endswith("query_key_value"):
        return None
    return torch.arange(out_features).reshape(heads_of(config).queries, 3, -1).transpose(0, 1).flatten()


ARCHITECTURES = {
    "arcee": Architecture("arcee", _rotary_pairs),
    "gemma": Architecture("gemma", _as_they_are),
    "gemma2": Architecture("gemma2", _as_they_are),
    "gemma3_text": Architecture("gemma3", _as_they_are),
    "gpt2": Architecture("gpt2", _as_they_are),  # its weights are transposed, factors of an adapter are not
    "gpt_neox": Architecture("gptneox", _whole_projections),
    "granite": Architecture("granite", _rotary_pairs),
    "llama": Architecture("llama", _rotary_pairs),
    "mistral": Architecture("llama", _rotary_pairs),
    "phi": Architecture("phi2", _as_they_are),
    "phi3": Architecture("phi3", _as_they_are),
    "qwen2": Architecture("qwen2", _as_they_are),
    "qwen3": Architecture("qwen3", _as_they_are),
    "smollm3": Architecture("smollm3", _rotary_pairs),
    "starcoder2": Architecture("starcoder2", _as_they_are),
}
"""By the model type of transformers."""
