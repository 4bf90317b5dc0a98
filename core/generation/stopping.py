"""The text of an answer up to a text at which it stops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lora_rt.core.generation.text import TextStream


class SpokenText:
    """Gives the new text of each token, and holds back what may be the beginning of a stop text.

    Args:
        tokenizer: the base's.
        stops: texts before which the answer ends.
    """

    def __init__(self, tokenizer: Any, stops: Sequence[str] = ()) -> None:
        self._stream = TextStream(tokenizer)
        self._stops = tuple(stops)
        self._held = ""
        self._ends: list[int] = []  # of the text of each token, in letters; a character stands at its last token
        self._out = 0  # letters that were given
        self._done = 0  # tokens whose text was
        self._over = False
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that can't belong to a stop text any more."""
        text = self._stream.push(token)
        self._ends.append(len(text) + (self._ends[-1] if self._ends else 0))
        self._held += text
        return self._given()

    @property
    def tokens(self) -> int:
        """How many tokens have their text given out: none that begins with a stop text or behind it."""
        if self._over and not self.stopped:
            return len(self._ends)
        while self._done < len(self._ends) and self._ends[self._done] <= self._out:
            self._done += 1
        begin = self._ends[self._done - 1] if self._done else 0
        in_it = self.stopped and self._done < len(self._ends) and begin < self._out  # a stop text begins within it
        return self._done + in_it

    def rest(self) -> str:
        """What is left when the answer is over; nothing of a stop text, or behind it."""
        self._over = True
        if self.stopped:
            return ""
        self._held += self._stream.rest()
        given = self._given()
        return given if self.stopped else given + self._held

    def _given(self) -> str:
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.stopped = True
            given = self._held[: min(places)]
        else:
            given, self._held = self._held[: self._safe()], self._held[self._safe() :]
        self._out += len(given)
        return given

    def _safe(self) -> int:
        """How much of what is held is no beginning of a stop text."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        first = max(0, len(self._held) - longest)
        starts = (n for n in range(first, len(self._held)) if any(s.startswith(self._held[n:]) for s in self._stops))
        return next(starts, len(self._held))
