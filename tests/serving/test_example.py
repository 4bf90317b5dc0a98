"""The client of examples/serve asks a running server, and prints what the compositions say alone."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from lora_rt.core.runtime import Runtime
from support.serving import Live

pytestmark = pytest.mark.slow

CLIENT = Path(__file__).parents[2] / "examples/serve/client.py"


def test_the_client_prints_every_mix_and_turns_an_answer_that_is_spoken(
    server: Live, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["rain", "--url", f"{server.url}/v1", "--registers", "one", "two"]
    monkeypatch.setattr(sys, "argv", [str(CLIENT), *arguments])
    runpy.run_path(str(CLIENT), run_name="__main__")
    said = capsys.readouterr().out
    usual = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 0, "max_new_tokens": 60}
    for mix in ("base", "one", "two", "one:0.7 two:0.3"):
        (alone,) = runtime.generate(["rain"], [None if mix == "base" else mix], **usual)
        assert f"{mix}\n    {alone}\n" in said
    head, _, turned = said.partition("one, from the tenth piece on two\n    ")
    assert turned.strip()
    assert head
