"""What a person types in a chat: whole messages, also pasted ones of many lines, and what is typed during an answer.

The editing is readline's. While an answer is shown the terminal does not echo, and what is typed is collected: whole
lines are the next messages, and the beginning of one stands in the next prompt. A paste is marked by the terminal as
one (bracketed paste), so that its line breaks do not end a message.
"""

from __future__ import annotations

import codecs
import contextlib
import os
import re
import select
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any

try:
    import termios
except ImportError:  # Windows
    termios = None  # type: ignore[assignment]

_ERASE = "\x7f\x08"
_END = "\x04"  # Ctrl-D
_ERASE_LINE = "\x15"  # Ctrl-U
_PASTE, _PASTED = "\x1b[200~", "\x1b[201~"
_MARKING, _NOT_MARKING = "\x1b[?2004h", "\x1b[?2004l"
# What one key or mark sends: a letter, or an escape sequence (an arrow), which may not be here whole yet.
_KEY = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1bO.|\x1b[^\[O]|[^\x1b]", re.DOTALL)


class Keyboard:
    """Reads messages from standard input."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque()
        self._begun = ""
        self._keys = ""  # the beginning of an escape sequence
        self._pasting = False
        self._ended = False
        self._collects = False
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
        self._readline = _readline()

    def read(self) -> str | None:
        """The next message without the blanks around it, or None at the end of input; Ctrl-C clears the line."""
        while True:
            if self._lines:
                line = self._lines.popleft().strip()
                print(f"> {line}", flush=True)
                return line
            if self._ended:
                return None
            try:
                return input("> ").strip()
            except EOFError:
                print(flush=True)
                return None
            except KeyboardInterrupt:
                print(flush=True)

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Collect what is typed while the block runs, unseen; Ctrl-C interrupts as ever."""
        settings = _without_echo()
        self._collects = settings is not None
        try:
            yield
        finally:
            if settings is not None:
                self.poll()
                self._collects = False
                _tell(_NOT_MARKING)
                termios.tcsetattr(sys.stdin, termios.TCSADRAIN, settings)
            if self._readline is not None:
                begun, self._begun = self._begun, ""
                self._readline.set_pre_input_hook(self._insert(begun) if begun else None)

    def poll(self) -> list[str]:
        """Take what has been typed by now while it is collected; the messages that wait to be read."""
        while self._collects and select.select([sys.stdin], [], [], 0)[0]:
            typed = os.read(sys.stdin.fileno(), 4096)
            if not typed:
                break
            self._take(self._decoder.decode(typed))
        return list(self._lines)

    def withdraw(self, line: str) -> None:
        """A line has been dealt with before it was read."""
        self._lines.remove(line)

    def _take(self, typed: str) -> None:
        keys, end = self._keys + typed, 0
        for match in _KEY.finditer(keys):
            if match.start() != end:
                break
            self._press(match[0])
            end = match.end()
        self._keys = keys[end:]

    def _press(self, key: str) -> None:
        if key in (_PASTE, _PASTED):
            self._pasting = key == _PASTE
        elif key in "\r\n" and self._pasting:
            self._begun += "\n"
        elif key in "\r\n":
            self._lines.append(self._begun)
            self._begun = ""
        elif key in _ERASE:
            self._begun = self._begun[:-1]
        elif key == _END:
            self._ended = self._ended or not self._begun
        elif key == _ERASE_LINE:
            self._begun = ""
        elif key.isprintable() or key == "\t":
            self._begun += key

    def _insert(self, begun: str) -> Any:
        def hook() -> None:
            self._readline.insert_text(begun)
            self._readline.redisplay()
            self._readline.set_pre_input_hook(None)

        return hook


def _readline() -> Any:
    """readline, set up so that a paste of many lines is one message; None where this Python was built without it."""
    try:
        import readline
    except ImportError:
        return None
    if _takes_orders():
        readline.parse_and_bind("set enable-bracketed-paste on")
    return readline


def _without_echo() -> Any:
    """Let the terminal hand over each key and show none; its settings before, or None where there is no terminal."""
    if termios is None or not sys.stdin.isatty():
        return None
    before = termios.tcgetattr(sys.stdin)
    quiet = termios.tcgetattr(sys.stdin)
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    _tell(_MARKING)
    return before


def _tell(order: str) -> None:
    """An order for the terminal, where it is one that takes orders."""
    if _takes_orders():
        sys.stdout.write(order)
        sys.stdout.flush()


def _takes_orders() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
