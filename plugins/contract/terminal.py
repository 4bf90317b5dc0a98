"""Text of a model or a stranger on a terminal, which obeys control characters: they are shown and not sent."""

from __future__ import annotations

import re

# Escape sequences, letters that reorder a line, and halves of a surrogate pair, which no terminal can be sent.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def harmless(text: str) -> str:
    """The text with control characters made visible; line breaks and tabs stay. Pieces of a text may come apart."""
    return _CONTROLS.sub(lambda match: ascii(match[0])[1:-1], text.replace("\r\n", "\n"))
