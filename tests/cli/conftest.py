"""The command line in this process."""

from __future__ import annotations

import pytest

from support.cli import Cli, command_line


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """`cli("compose", "emotion", stdin="...")`."""
    return command_line(monkeypatch, capsys)
