"""What a person types in a chat: whole messages, also pasted ones of many lines, and what is typed during an answer.

The editing is readline's. While an answer is shown the terminal does not echo, and what is typed is collected: whole
lines are the next messages, and the beginning of one stands in the next prompt.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
from collections import deque
from collections.abc import Iterator
from typing import Any

_ERASE = "\x7f\x08"


class Keyboard:
    """Reads messages from standard input."""

    def __init__(self) -> None:
        self._lines: deque[str] = deque()
        self._begun = ""
        self._readline = _readline()

    def read(self) -> str | None:
        """The next message without the blanks around it, or None at the end of input; Ctrl-C clears the line."""
        while True:
            if self._lines:
                line = self._lines.popleft().strip()
                print(f"> {line}", flush=True)
                return line
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
        try:
            yield
        finally:
            if settings is not None:
                self.poll()
                import termios

                termios.tcsetattr(sys.stdin, termios.TCSADRAIN, settings)
        if self._readline is not None:
            begun, self._begun = self._begun, ""
            self._readline.set_pre_input_hook(self._insert(begun) if begun else None)

    def poll(self) -> list[str]:
        """Take what has been typed by now; the lines that wait to be read."""
        while select.select([sys.stdin], [], [], 0)[0]:
            typed = os.read(sys.stdin.fileno(), 4096)
            if not typed:
                break
            self._take(typed.decode(errors="ignore"))
        return list(self._lines)

    def withdraw(self, line: str) -> None:
        """A line has been dealt with before it was read."""
        self._lines.remove(line)

    def _take(self, typed: str) -> None:
        for letter in typed:
            if letter in "\r\n":
                self._lines.append(self._begun)
                self._begun = ""
            elif letter in _ERASE:
                self._begun = self._begun[:-1]
            elif letter.isprintable() or letter == "\t":
                self._begun += letter

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
    readline.parse_and_bind("set enable-bracketed-paste on")
    return readline


def _without_echo() -> Any:
    """Let the terminal hand over each key and show none; its settings before, or None where there is no terminal."""
    try:
        import termios
    except ImportError:  # Windows
        return None
    if not sys.stdin.isatty():
        return None
    before = termios.tcgetattr(sys.stdin)
    quiet = termios.tcgetattr(sys.stdin)
    quiet[3] &= ~(termios.ECHO | termios.ICANON)
    termios.tcsetattr(sys.stdin, termios.TCSADRAIN, quiet)
    return before
