"""Tokens to text, piece by piece."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

_REPLACEMENT = "\ufffd"


def pieces_of(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text that each token adds, control tokens too; a character of several stands at its last one.

    A token decoded by itself would lose the space before its word, and be no text where it is part of a character.
    """
    stream = TextStream(tokenizer, skip_special_tokens=False)
    pieces = [stream.push(token) for token in ids]
    return [*pieces[:-1], pieces[-1] + stream.rest()] if pieces else []


def bytes_of(tokenizer: Any, token: int) -> bytes | None:
    """The bytes of one token in UTF-8, also where they are part of a character; None where nothing tells them.

    Tokenizers spell a byte that is no text as a letter of GPT-2's table, or as <0xE2>.
    """
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    if _REPLACEMENT not in text:
        return text.encode()
    spell = getattr(tokenizer, "convert_ids_to_tokens", None)
    spelt = str(spell(token)) if spell is not None else text
    if single := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", spelt):
        return bytes.fromhex(single[1])
    letters = _byte_of_letter()
    return bytes(letters[letter] for letter in spelt) if set(spelt) <= letters.keys() else None


@cache
def _byte_of_letter() -> Mapping[str, int]:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    return {letter: byte for byte, letter in bytes_to_unicode().items()}


class TextStream:
    """Gives the new text of each token as soon as it can't change any more.

    A character may take several tokens, and some tokenizers put the space of a word before or after it depending on its
    neighbours: so each piece is the difference of two decodings that share their beginning.
    """

    def __init__(self, tokenizer: Any, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._ids: list[int] = []
        self._start = 0  # of the window that is decoded again
        self._read = 0  # tokens whose text was given out

    def push(self, token: int) -> str:
        """The text that this token completes, or an empty string."""
        self._ids.append(token)
        text = self._decode(len(self._ids))
        before = self._decode(self._read)
        if text.endswith(_REPLACEMENT) or len(text) <= len(before):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return text[len(before) :]

    def rest(self) -> str:
        """What is left when the answer is over."""
        return self._decode(len(self._ids))[len(self._decode(self._read)) :]

    def _decode(self, end: int) -> str:
        ids = self._ids[self._start : end]
        # Spaces are not tidied: that depends on what follows.
        return str(self._tokenizer.decode(ids, skip_special_tokens=self._skip, clean_up_tokenization_spaces=False))
