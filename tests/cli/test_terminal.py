"""What a model or a stranger wrote does not give orders to the terminal."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import unicodedata
from contextlib import suppress
from pathlib import Path

import pytest

from lora_rt.plugins.contract.terminal import harmless
from support.cli import Cli
from support.tiny import Zoo

pytestmark = pytest.mark.slow

COLOUR = "a\x1b[31mred\x1b]0;title\x07 \x9b2J b"


def test_only_letters_line_breaks_and_tabs_reach_a_terminal() -> None:
    for code in range(0x110000):
        shown = harmless(chr(code))
        assert shown == chr(code) or unicodedata.category(chr(code)) in ("Cc", "Cf", "Cs")
        assert all(letter in "\n\t" or unicodedata.category(letter) not in ("Cc", "Cs") for letter in shown)
    assert harmless("\r\n") == "\n"
    assert harmless("море 日本語 שלום 👩‍👩‍👧") == "море 日本語 שלום 👩‍👩‍👧"


def test_answers_prompts_and_errors_are_shown_without_control_characters(cli: Cli, zoo: Zoo) -> None:
    tiny = ["--base", str(zoo.base("llama")), "--precision", "float32", "--max-new-tokens", "60", "--seed", "1"]
    adapter = str(zoo.adapter("llama", seed=1))
    hot = ["--temperature", "3", "--top-p", "1"]
    for asked in (["--compare", "-p", COLOUR], ["-p", COLOUR], ["-p", COLOUR, "--template-var", "a\x1bb"]):
        done = cli("compose", adapter, *asked, *tiny, *hot)
        assert "\x1b" not in done.out + done.err
        assert "\x9b" not in done.out + done.err
    document = json.loads(cli("compose", adapter, "-p", COLOUR, "--json", *tiny, *hot).out)
    assert document["prompt"] == COLOUR
    assert any(unicodedata.category(letter) == "Cc" for letter in document["text"]), "this answer tells nothing"


def test_a_template_that_complains_in_colours_is_quoted_without_them(cli: Cli, tmp_path: Path) -> None:
    from support.templates import save_base, tokenizer

    save_base(tmp_path / "base", tokenizer("bytes", "{{ raise_exception('\x1b[31mno') }}"))
    done = cli("compose", "emotion:0", "-p", "x", "--base", str(tmp_path / "base"), "--precision", "float32")
    assert done.code == 1
    assert "\x1b" not in done.err


@pytest.mark.parametrize("asks", [{"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=lambda asks: next(iter(asks)))
@pytest.mark.parametrize("command", [["list"], ["compose", "--help"], ["show", "nobody"]])
def test_who_wants_letters_alone_gets_nothing_else(command: list[str], asks: dict[str, str]) -> None:
    ours, theirs = pty.openpty()
    plain = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "TERM", "FORCE_COLOR")}
    code = "from lora_rt.core.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, *command],
        stdout=theirs,
        stderr=theirs,
        env=plain | {"TERM": "xterm-256color"} | asks,
    ) as child:
        os.close(theirs)
        said = b""
        with suppress(OSError):  # how the end of a terminal is told
            while piece := os.read(ours, 65536):
                said += piece
    os.close(ours)
    assert len(said) > 20
    assert b"\x1b" not in said
    assert child.returncode in (0, 1)
