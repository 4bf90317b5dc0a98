"""What hooks receive, made by hand: contexts over a base of two layers that exists only as numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from lora_rt.plugins.contract import (
    BaseFacts,
    ComposeContext,
    GateContext,
    ObjectiveContext,
    SceneContext,
    SceneType,
    TermFacts,
)

if TYPE_CHECKING:
    from torch import Tensor


def base_facts(**changed: Any) -> BaseFacts:
    """A base of two layers, four query heads and two key/value heads; any field by name."""
    facts: dict[str, Any] = {
        "id": "tiny",
        "revision": None,
        "digest": "0" * 64,
        "precision": "float32",
        "layers": 2,
        "hidden_size": 64,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 16,
        "vocab_size": 259,
    }
    return BaseFacts(**(facts | changed))


def objective_context(options: Mapping[str, str] | None = None, **changed: Any) -> ObjectiveContext:
    """A training run whose tokens are the UTF-8 bytes of a text; 256 opens an answer and 257 ends it."""
    fields: dict[str, Any] = {
        "register": "mine",
        "base": base_facts(),
        "seed": 0,
        "options": options or {},
        "prompt_ids": lambda text: [*text.encode(), 256],
        "answer_ids": lambda text: [*text.encode(), 257],
    }
    return ObjectiveContext(**(fields | changed))


def compose_context(
    weights: Sequence[float], mode: str = "mine", others: Sequence[float] = (), **changed: Any
) -> ComposeContext:
    """A row with terms of the mode (`weights`), and terms of another mode (`others`) behind them."""
    mine = [TermFacts(f"mine-{i}", weight, mode, {}) for i, weight in enumerate(weights)]
    foreign = [TermFacts(f"other-{i}", weight, "another-mode", {}) for i, weight in enumerate(others)]
    fields: dict[str, Any] = {"prompt": "a prompt", "scene_type": None, "base": base_facts()}
    return ComposeContext(terms=[*mine, *foreign], mine=range(len(mine)), **(fields | changed))


def scene_context(rows: int = 2, tokens: int = 5, **changed: Any) -> SceneContext:
    """Prompts whose scene type is asked for: fixed hidden states, the last row padded by one token on the left."""
    base = changed.get("base") or base_facts()
    mask = torch.ones(rows, tokens, dtype=torch.long)
    mask[-1, 0] = 0
    hidden = torch.sin(torch.arange(rows * tokens * base.hidden_size).view(rows, tokens, -1) / 7)
    fields: dict[str, Any] = {"adapter": "mine", "card": {}, "state": {}, "base": base, "hidden": hidden, "mask": mask}
    return SceneContext(**(fields | changed))


def gate_context(
    prompt_lengths: Sequence[int],
    tokens: int,
    first: int = 0,
    *,
    state: Mapping[str, Tensor] | None = None,
    scene_types: Sequence[SceneType] | None = None,
    **changed: Any,
) -> GateContext:
    """One pass over rows without padding.

    Args:
        prompt_lengths: one per row.
        tokens: how many tokens of each row this pass sees.
        first: how many came before, in earlier passes with a cache.
        state: the tensors of mode.safetensors.
        scene_types: one per row, unknown if left out.

    A row's tokens and early hidden states depend on its own number and the position alone, so that passes over parts of
    a text see what one pass over the whole of it sees.
    """
    rows = len(prompt_lengths)
    base = changed.get("base") or base_facts()
    positions = torch.arange(first, first + tokens).expand(rows, tokens)
    every = (torch.arange(first + tokens).expand(rows, -1) * 7 + torch.arange(rows)[:, None] * 13) % 256
    history = torch.sin(every[..., None] + torch.arange(base.hidden_size) / 3)
    fields: dict[str, Any] = {
        "adapter": "mine",
        "card": {},
        "state": state or {},
        "base": base,
        "rank": 4,
        "input_ids": every[:, first:],
        "positions": positions,
        "prompt_lengths": torch.tensor(list(prompt_lengths)),
        "active": [True] * rows,
        "scene_types": list(scene_types or [None] * rows),
        "hidden": lambda: history[:, first:],
        "history": lambda: (history, torch.ones_like(every)),
    }
    return GateContext(**(fields | changed))
