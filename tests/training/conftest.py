"""A tiny base to train on, and a data file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lora_rt.core.step.settings import TrainSettings
from support.cli import Cli, command_line
from support.tiny import Zoo


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """The command line, in this process."""
    return command_line(monkeypatch, capsys)


def write_pairs(path: Path, count: int = 24) -> Path:
    """Scene -> text pairs whose text can be learned: it is always the same few letters."""
    lines = [json.dumps({"scene": f"scene {number}", "text": "abcabcabc"[: 6 + number % 3]}) for number in range(count)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def settings(zoo: Zoo, tmp_path: Path) -> Callable[..., TrainSettings]:
    """Settings of a run of a second over a tiny Llama."""

    def make(**changes: Any) -> TrainSettings:
        plain: dict[str, Any] = {
            "register": "letters",
            "mode": "output-only",
            "data": write_pairs(tmp_path / "pairs.jsonl"),
            "base": str(zoo.base("llama")),
            "precision": "float32",
            "r": 4,
            "alpha": 8,
            "learning_rate": 2e-2,
            "epochs": 2,
            "batch_size": 4,
        }
        return TrainSettings(**{**plain, **changes})

    return make
