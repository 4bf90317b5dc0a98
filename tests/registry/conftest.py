"""A home and a registry of their own for every test."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lora_rt.registry.registry import Registry
from lora_rt.registry.store import Store
from support.cli import Cli, command_line


@pytest.fixture(scope="session")
def memory_root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in memory where there is one, for tests that write thousands of times."""
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tmp_path_factory.getbasetemp()
    with tempfile.TemporaryDirectory(prefix="lora-rt-tests-", dir=place) as folder:
        yield Path(folder)


@pytest.fixture
def memory(memory_root: Path) -> Iterator[Path]:
    """An empty folder in memory."""
    with tempfile.TemporaryDirectory(dir=memory_root) as folder:
        yield Path(folder)


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


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """`cli("list", "--json")`."""
    return command_line(monkeypatch, capsys)
