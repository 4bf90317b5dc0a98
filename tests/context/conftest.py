"""A tiny base with four attention heads over two key/value heads, and two context adapters with random gates."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lora_rt.core.runtime import Runtime
from lora_rt.core.step.adapter import described_state
from lora_rt.registry.card import AdapterCard, BaseIdentity, write_card
from support.cli import Cli, command_line
from support.tiny import HEADS, HIDDEN, LAYERS, Zoo

TYPES = ("logic", "body")


def context_state(seed: int | None, heads: int = HEADS) -> dict[str, torch.Tensor]:
    """The state of a context adapter: random, or untrained where there is no seed."""
    shapes = {"theta": (2, LAYERS, heads), "scale": (2,), "registrar": (3, HIDDEN + 1)}
    generator = torch.Generator().manual_seed(seed or 0)
    size = 0.0 if seed is None else 1.0
    return {name: torch.randn(shape, generator=generator) * size for name, shape in shapes.items()}


def make_context_adapter(zoo: Zoo, folder: Path, *, seed: int, state: dict[str, torch.Tensor]) -> Path:
    """A random adapter on q, k, v and o, with this state and its card."""
    shutil.copytree(zoo.adapter("llama", seed=seed), folder)
    save_file(state, folder / "mode.safetensors")
    base = BaseIdentity(id=zoo.base("llama").name, revision=None, digest="")
    card = AdapterCard(register="logic", mode="context", base=base, scene_types=TYPES, state=described_state(folder))
    write_card(folder, card)
    return folder


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """`cli("compose", "logic", "--scene", "body")`."""
    return command_line(monkeypatch, capsys)


@pytest.fixture
def made(zoo: Zoo, tmp_path: Path) -> Callable[..., Path]:
    """made("logic", seed=1): the folder of a context adapter; gates=None is an untrained one."""

    def make(name: str, seed: int = 1, gates: int | None = 1, **options: Any) -> Path:
        return make_context_adapter(zoo, tmp_path / name, seed=seed, state=context_state(gates, **options))

    return make


@pytest.fixture
def runtime(zoo: Zoo) -> Runtime:
    """A runtime of its own for every test: adapters stay resident."""
    return zoo.runtime("llama", fresh=True)
