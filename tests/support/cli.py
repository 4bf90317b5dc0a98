"""Runs the command line in this process, exactly as `lora-rt` does, exit codes and all."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Outcome:
    """Exit code, standard output and standard error."""

    code: int
    out: str
    err: str


Cli = Callable[..., Outcome]


class Piped(io.StringIO):
    """Standard input that is no terminal."""

    def isatty(self) -> bool:
        return False


def command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """`cli("compose", "emotion", stdin="...")`."""
    from lora_rt.core.cli.app import run

    monkeypatch.setenv("COLUMNS", "160")

    def invoke(*arguments: str, stdin: str = "") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["lora-rt", *arguments])
        monkeypatch.setattr(sys, "stdin", Piped(stdin))
        capsys.readouterr()
        code: object = 0
        try:
            run()
        except SystemExit as ended:
            code = ended.code
        captured = capsys.readouterr()
        return Outcome(int(str(code or 0)), captured.out, captured.err)

    return invoke
