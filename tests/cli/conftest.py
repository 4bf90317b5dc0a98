"""Runs the command line in this process, exactly as `lora-rt` does, exit codes and all."""

from __future__ import annotations

import sys

import pytest

from support.cli import Cli, Outcome, Piped


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """`cli("compose", "emotion", stdin="...")`."""
    from lora_rt.core.cli.app import run

    monkeypatch.setenv("COLUMNS", "160")

    def invoke(*arguments: str, stdin: str = "") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["lora-rt", *arguments])
        monkeypatch.setattr(sys, "stdin", Piped(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            run()
        captured = capsys.readouterr()
        return Outcome(int(caught.value.code or 0), captured.out, captured.err)

    return invoke
