"""A home and a registry of their own for every test."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_rt.registry.registry import Registry
from lora_rt.registry.store import Store


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, also for the commands that read the environment."""
    folder = tmp_path / "home"
    monkeypatch.setenv("LORA_RT_HOME", str(folder))
    return folder


@pytest.fixture
def store(home: Path) -> Store:
    """The store of that home."""
    return Store(home)


@pytest.fixture
def registry(home: Path, tmp_path: Path) -> Registry:
    """A registry whose project is an empty folder."""
    project = tmp_path / "project"
    project.mkdir()
    return Registry(home, project)
