"""A chat at a real terminal: pastes, what is typed during an answer, weights that change while it is spoken."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lora_rt.core.cli.compose.keyboard import Keyboard
from support.tiny import SPECIAL, Zoo

pytestmark = pytest.mark.slow

PASTE = "\x1b[200~one\rtwo\x1b[201~"


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The end of a terminal at which a person types."""
    ours, theirs = pty.openpty()
    with open(theirs, encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        yield ours
    os.close(ours)


def collected(typed: int, *pieces: str | bytes) -> tuple[list[str], str]:
    """The whole messages, and the one that was begun, of what is typed piece by piece during an answer."""
    keyboard = Keyboard()
    keyboard._readline = None  # what was begun stays where it can be looked at
    lines: list[str] = []
    with keyboard.collecting():
        for piece in pieces:
            os.write(typed, piece.encode() if isinstance(piece, str) else piece)
            select.select([sys.stdin], [], [], 10)
            lines = keyboard.poll()
    return lines, keyboard._begun


def test_what_is_typed_during_an_answer_is_kept_and_not_shown(typed: int) -> None:
    assert collected(typed, "first\rsec", "ond\rthi") == (["first", "second"], "thi")
    assert not select.select([typed], [], [], 0)[0], "the terminal has shown what was typed"
    assert termios.tcgetattr(sys.stdin)[3] & termios.ECHO


def test_a_paste_during_an_answer_is_one_message(typed: int) -> None:
    assert collected(typed, PASTE + "\r" + "next") == (["one\ntwo"], "next")


@pytest.mark.parametrize("cut", range(1, len(PASTE)))
def test_a_paste_that_arrives_in_two_parts_is_one_message(typed: int, cut: int) -> None:
    assert collected(typed, PASTE[:cut], PASTE[cut:] + "\r") == (["one\ntwo"], "")


def test_keys_that_write_nothing_leave_nothing_in_a_message(typed: int) -> None:
    assert collected(typed, "ab\x1b[D\x1bOA\x1b[1;5Cc\x7fd\x07\r") == (["abd"], "")
    assert collected(typed, "all of it\x15new\r") == (["new"], "")


def test_the_end_of_input_that_is_typed_during_an_answer_ends_the_chat_after_it(typed: int) -> None:
    keyboard = Keyboard()
    with keyboard.collecting():
        os.write(typed, b"last\r\x04")
        select.select([sys.stdin], [], [], 10)
        keyboard.poll()
    assert (keyboard.read(), keyboard.read()) == ("last", None)


def test_a_letter_of_several_bytes_may_arrive_in_parts(typed: int) -> None:
    whole = "мо".encode()
    assert collected(typed, whole[:3], whole[3:] + b"\r") == (["мо"], "")


class Terminal:
    """A program at a terminal of 80 columns."""

    def __init__(self, ours: int, process: subprocess.Popen[bytes]) -> None:
        self.ours, self.process, self.seen = ours, process, ""

    def see(self, wanted: str) -> str:
        """Wait for a text, on several lines perhaps; what was shown until then."""
        # Where the terminal breaks a line is not the question here.
        pattern = r"\s+".join(map(re.escape, wanted.split()))
        while not (found := re.search(pattern, _plain(self.seen))):
            assert select.select([self.ours], [], [], 120)[0], f"{wanted!r} does not come after {self.seen!r}"
            self.seen += os.read(self.ours, 4096).decode(errors="ignore")
        before, self.seen = _plain(self.seen)[: found.end()], _plain(self.seen)[found.end() :]
        return before

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())


def _plain(text: str) -> str:
    return re.sub(r"\x1b\[[0-?]*[ -/]*[@-~]", "", text)


@contextlib.contextmanager
def chat(*arguments: str) -> Iterator[Terminal]:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(ours, (24, 80))
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR")}
    # Tests that were started in the background of a script ignore Ctrl-C, and so would what they start.
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [sys.executable, "-m", "lora_rt", "compose", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**environment, "TERM": "xterm"},
        start_new_session=True,
        preexec_fn=_own_terminal,
    )
    signal.signal(signal.SIGINT, heard)
    os.close(theirs)
    try:
        yield Terminal(ours, process)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def _own_terminal() -> None:
    """Ctrl-C reaches a program whose terminal this is."""
    import fcntl

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def endless(base: Path, folder: Path) -> Path:
    """That base, which never ends its turn: every other token is far more likely than those with a meaning."""
    copied = Path(shutil.copytree(base, folder / "endless"))
    tensors = load_file(copied / "model.safetensors")
    tensors["lm_head.weight"] *= 10
    tensors["lm_head.weight"][: len(SPECIAL)] = 0
    save_file(tensors, copied / "model.safetensors", {"format": "pt"})
    return copied


def test_a_chat_at_a_terminal(zoo: Zoo, tmp_path: Path) -> None:
    one, two = (str(zoo.adapter("llama", seed=seed)) for seed in (1, 2))
    base = endless(zoo.base("llama", max_position_embeddings=65536), tmp_path)  # no answer fills it
    tiny = ["--base", str(base), "--allow-base-mismatch", "--precision", "float32"]
    with chat(one, *tiny, "--max-new-tokens", "4000", "--seed", "1") as terminal:
        terminal.see("Type a message, or /help.")
        terminal.type("/scene nonsense\r")
        terminal.see("no adapter in use tells scenes apart")
        terminal.type("/dance\r")
        terminal.see("there is no /dance")
        terminal.type("\x1b[200~a\rb\x1b[201~")
        terminal.see("b")
        terminal.type("\r/weights nobody\r")
        terminal.see("error: there is no adapter 'nobody'")
        terminal.type(f"/weights {two}:0.5\rnext")
        terminal.see(f"from here on: {Path(two)}:0.5"[:70])
        terminal.type("\x03")
        terminal.see("(stopped)")
        terminal.see("> next")
        terminal.type("\x15/weights\r")
        terminal.see(f"{Path(two).name}:0.5")
        terminal.see("> ")
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
