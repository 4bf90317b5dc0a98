"""A tiny base of random weights, and one that lies on disk, each with the systems over it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from lora_rt.core.benchmark.lab import Lab
from lora_rt.core.benchmark.workloads import Origin
from support.cli import Cli, command_line
from support.tiny import Zoo


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    """Of float32, in which systems that do the same say the same."""
    return Lab(Origin(random="tiny", precision="float32", device="cpu"), tmp_path)


@pytest.fixture
def disk_lab(zoo: Zoo, tmp_path: Path) -> Lab:
    """Of a base that other processes can load."""
    base = zoo.base("llama", max_position_embeddings=1024)
    return Lab(Origin(base=str(base), precision="float32", device="cpu"), tmp_path)


@pytest.fixture
def quiet() -> Callable[[int, str], None]:
    """Somebody to report to."""
    return lambda _done, _what: None


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """`cli("bench", "--quick")`, exactly as `lora-rt` does it."""
    return command_line(monkeypatch, capsys)
