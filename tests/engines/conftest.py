"""The plugin for vLLM over fakes of vLLM's two classes, a tiny base, and a store of registers for it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lora_rt.registry.registry import Registry
from support.tiny import Zoo

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "examples" / "lora-rt-vllm"
FAKE = ROOT / "tests" / "support" / "fake_vllm"

Install = Callable[..., None]


@pytest.fixture
def plugin(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`import lora_rt_vllm` and `import vllm` work, and nothing of them is left afterwards."""
    for folder in (PLUGIN, FAKE):
        monkeypatch.syspath_prepend(str(folder))
    yield
    if shared := sys.modules.get("lora_rt_vllm.shared"):
        shared.forget()
    for name in [name for name in sys.modules if name.partition(".")[0] in ("lora_rt_vllm", "vllm")]:
        del sys.modules[name]


@pytest.fixture
def install(tmp_path: Path) -> Install:
    """`install(name, folder)` puts a copy of an adapter into the store."""

    def put(name: str, folder: Path) -> None:
        import shutil

        store = Registry().store
        with store.staging() as staged:
            shutil.copytree(folder, staged, dirs_exist_ok=True)
            store.publish(staged, name, source="trained", revision=None)

    return put


@pytest.fixture
def base(zoo: Zoo, install: Install) -> Path:
    """A tiny Llama; the store has emotion (rank 4), logic (rank 6) and body (rank 8) for it."""
    for seed, (name, rank) in enumerate({"emotion": 4, "logic": 6, "body": 8}.items(), start=1):
        install(name, zoo.adapter("llama", seed=seed, r=rank, mode="output-only"))
    return zoo.base("llama")


@pytest.fixture
def settings(plugin: None, base: Path, tmp_path: Path) -> Any:
    """Those of a server over the tiny base that takes rank 16."""
    from lora_rt_vllm.settings import Settings

    return Settings(str(base), 16, (), tmp_path / "exports", 10**9, "float32", ("base",))


@pytest.fixture
def served(settings: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`served(**changes)`: the resolver of a server with these settings, as vLLM gets it."""

    def make(**changes: Any) -> Any:
        import lora_rt_vllm
        from lora_rt_vllm.shared import forget
        from vllm.lora.resolver import LoRAResolverRegistry

        for name, value in replace(settings, **changes).environment().items():
            monkeypatch.setenv(name, value)
        forget()
        lora_rt_vllm.register()
        return LoRAResolverRegistry.get_resolver("lora-rt")

    return make
