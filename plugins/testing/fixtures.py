"""Fixtures for an author's own tests: `pytest_plugins = ["lora_rt.plugins.testing.fixtures"]` in a conftest.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_rt.plugins.testing.tiny import tiny_base


@pytest.fixture
def lora_rt_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home, for this test and the processes that it starts."""
    home = tmp_path / "lora-rt-home"
    monkeypatch.setenv("LORA_RT_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def lora_rt_tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny base (see `tiny_base`), made once for all tests."""
    return tiny_base(tmp_path_factory.mktemp("base") / "tiny")
