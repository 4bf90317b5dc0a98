"""A base's facts in one place: its blocks, its heads, its context, what its forward pass takes, and rows as tensors."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_rt.core.base.source import BaseError
from lora_rt.core.base.upstream import device_hook


@dataclass(frozen=True, slots=True)
class Heads:
    """The attention heads of a configuration: of queries, of keys and values, and the features of one."""

    queries: int
    keys: int
    size: int


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """What a model's forward pass can be told, which differs from architecture to architecture.

    `first_position` is what the first token's position is called: RoBERTa's begin behind that of its padding.
    """

    takes_positions: bool
    takes_columns: bool
    first_position: int = 0

    @classmethod
    def of(cls, model: Any) -> ForwardPass:
        """Read off the signature, that of the base where the model is PEFT's."""
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        names = inspect.signature(inner.forward).parameters
        takes_positions = "position_ids" in names
        return cls(takes_positions, "logits_to_keep" in names, _first_position(inner) if takes_positions else 0)

    def arguments(self, ids: Tensor, mask: Tensor | None = None, columns: int | Tensor | None = None) -> dict[str, Any]:
        """The arguments of a pass over rows; what the model does not take is left out.

        Args:
            ids: (rows, tokens).
            mask: (rows, all tokens), those in the cache too; None where no row is padded, for then the kernel without
                a mask is faster.
            columns: the last n columns, or the indices (n,) of those whose logits are wanted; see `kept`.
        """
        given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
        if mask is not None:
            given["attention_mask"] = mask
            if self.takes_positions:
                given["position_ids"] = positions_of(mask)[:, -ids.shape[1] :] + self.first_position
        if columns is not None and self.takes_columns:
            given["logits_to_keep"] = _gathered(columns, ids)
        return given

    def kept(self, logits: Tensor, columns: int | Tensor | None) -> Tensor:
        """The wanted columns of the logits (rows, n, vocab) of a pass, which the model may have cut off itself."""
        if columns is None or self.takes_columns:
            return logits
        return logits[:, -columns:] if isinstance(columns, int) else logits[:, columns]


def _gathered(columns: int | Tensor, ids: Tensor) -> int | Tensor:
    """The same columns as a model takes them together into new memory.

    The last n are a view between whose rows lie the others'. On a CPU torch multiplies each of its rows for itself, in
    bfloat16 by a loop without vectors: sixteen rows by an output head of 49,152 words take 1.4 s and not 25 ms.
    (Gemma 4, which leaves tokens out of its last blocks where it is told a number, reads all of them then.)
    """
    if not isinstance(columns, int) or not 0 < columns < ids.shape[1] or ids.device.type != "cpu":
        return columns
    return torch.arange(ids.shape[1] - columns, ids.shape[1], device="cpu")


def device_of(model: Any) -> torch.device:
    """Where a model takes its token ids: its embedding's device, or where accelerate computes what it offloads."""
    embedding = model.get_input_embeddings()
    hook = device_hook(embedding)
    hooks = getattr(hook, "hooks", (hook,))
    moved = next((found for one in hooks if (found := getattr(one, "execution_device", None)) is not None), None)
    if moved is not None:
        return torch.device(moved)
    tensors = [*embedding.parameters(), *embedding.buffers()]
    return next((tensor.device for tensor in tensors if tensor.device.type != "meta"), torch.device("cpu"))


def _first_position(model: nn.Module) -> int:
    """One more than the row of a table of positions that stands for padding; 0 without one."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and "position" in name and module.padding_idx is not None:
            return module.padding_idx + 1
    return 0


def heads_of(config: Any) -> Heads:
    """The heads of a transformers configuration; a model without attention (Mamba, RWKV) is one head as wide as it."""
    text = config.get_text_config(decoder=True)
    queries = _number(text, "num_attention_heads", "n_heads") or 1
    keys = _number(text, "num_key_value_heads") or queries
    return Heads(queries, keys, _number(text, "head_dim") or max(1, (width_of(config) or queries) // queries))


def _number(config: Any, *names: str) -> int | None:
    """The first field that is a number above 0. Some types raise where a field differs from layer to layer."""
    for name in names:
        try:
            value = getattr(config, name, None)
        except (KeyError, TypeError, ValueError, RuntimeError):
            continue
        if isinstance(value, int) and value > 0:
            return value
    return None


def width_of(config: Any) -> int | None:
    """The features of a hidden state."""
    return _number(config.get_text_config(decoder=True), "hidden_size", "d_model", "n_embd")


def vocabulary_of(config: Any) -> int:
    """How many tokens the model of a configuration knows."""
    return _number(config.get_text_config(decoder=True), "vocab_size") or 1


def layers_of(config: Any) -> int:
    """How many blocks a transformers configuration asks for."""
    text = config.get_text_config(decoder=True)
    return _number(text, "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks") or 0


def blocks_of(model: Any) -> nn.ModuleList:
    """The model's transformer blocks, from the input up.

    Of several lists that lie in no other one, as in models with a tower for pictures: one that is as long as the
    configuration says, of several of these the one that lies highest in the decoder; else the one with the most
    parameters.

    Raises:
        BaseError: it keeps none.
    """
    lists: dict[str, nn.ModuleList] = {}
    inner: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and id(module) not in inner:
            lists[name] = module
            inner |= {id(below) for below in module.modules()} - {id(module)}
    if not lists:
        text = f"{type(model).__name__} does not keep its blocks in a list"
        raise BaseError(text, next_step="Use a base that does")
    count = layers_of(model.config)
    fitting = {name: blocks for name, blocks in lists.items() if len(blocks) == count}
    if fitting:
        decoder = {id(module) for module in getattr(model, "get_decoder", lambda: model)().modules()}
        return fitting[min(fitting, key=lambda name: (id(fitting[name]) not in decoder, name.count(".")))]
    return max(lists.values(), key=lambda blocks: sum(p.numel() for p in blocks.parameters()))


def context_of(config: Any) -> int:
    """How many tokens a model of this configuration reads; `sys.maxsize` where nothing bounds it.

    YaRN and dynamic rope scaling stretch what a configuration states. LongRoPE and Llama 3 state the stretched length
    already, and of linear scaling it is not known which of the two is stated: there the statement counts.
    """
    text = config.get_text_config()
    stated = getattr(text, "max_position_embeddings", None)
    if not stated:
        return sys.maxsize
    rope = getattr(text, "rope_parameters", None) or {}
    first = rope.get("original_max_position_embeddings") or stated
    stretches = rope.get("rope_type") in ("yarn", "dynamic")
    return max(int(stated), int(rope.get("factor", 1.0) * first)) if stretches else int(stated)


def pad_right(
    rows: Sequence[Sequence[int]], device: torch.device | str, *, left: bool = False
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of rows, both (rows, tokens) int64, so that all begin in the first column.

    What stands on padding is masked: any token that exists will do, and 0 exists in every vocabulary.
    """
    width = max(len(row) for row in rows)
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(0, len(row))
        ids[number, place] = torch.as_tensor(row, dtype=torch.long)
        mask[number, place] = 1
    return ids.to(device), mask.to(device)


def pad_left(rows: Sequence[Sequence[int]], device: torch.device | str) -> tuple[Tensor, Tensor]:
    """The same, so that all rows end in the last column."""
    return pad_right(rows, device, left=True)


def positions_of(mask: Tensor) -> Tensor:
    """The position of each token counted from its row's first real token, (rows, tokens); 0 on padding before it."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)
