"""A tiny base, two adapters, and named compositions with a random router over them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save

from lora_rt.registry.compositions import NamedComposition, NamedTerm
from lora_rt.registry.files import sha256_bytes
from lora_rt.registry.registry import Registry
from support.routers import router_state
from support.tiny import Zoo


@pytest.fixture
def routed(zoo: Zoo) -> Callable[..., list[Path]]:
    """routed("my-router", gate="softmax", ...) saves a named composition and gives the folders of its adapters."""

    def make(
        name: str,
        weights: tuple[float, ...] = (0.5, 0.3),
        gate: str = "softmax",
        groups: int = 1,
        recent: int = 3,
        **changes: Any,
    ) -> list[Path]:
        folders = [zoo.adapter("llama", seed=seed, r=4) for seed in range(1, 1 + len(weights))]
        content = save(changes.pop("state", None) or router_state(len(weights), groups))
        registry = Registry()
        terms = [
            NamedTerm(reference=str(folder), sha256=registry.resolve(str(folder)).sha256, weight=weight)
            for folder, weight in zip(folders, weights, strict=True)
        ]
        facts = {
            "base": zoo.base("llama").name,
            "hidden_layers": 1,
            "card": {"gate": gate, "recent": recent},
            **changes,
        }
        made = NamedComposition(name=name, terms=tuple(terms), mode="router", state=sha256_bytes(content), **facts)
        registry.compositions.save(made, content)
        return folders

    return make
