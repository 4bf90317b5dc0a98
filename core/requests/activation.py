"""The bracket that says when something begins: `body:0.5[So:]` acts from where the text "So:" has appeared.

Inside the bracket stands the text as it is, blanks and separators included; `\\]` and `\\\\` stand for `]` and `\\`.
"""

from __future__ import annotations

import re

BRACKET = r"\[(?:[^\]\\]|\\.)+\]"
_TYPE = r"[^\s\[\],+]+"
_SCENE = re.compile(rf"\s*(?P<type>{_TYPE})(?P<after>{BRACKET})?[\s,+]*")


def is_scene_type(text: str) -> bool:
    """Whether a scene type can be named where scenes are written."""
    return re.fullmatch(_TYPE, text) is not None


def written(after: str | None) -> str:
    """The bracket of an activation text; nothing where there is none."""
    if after is None:
        return ""
    return "[" + after.replace("\\", "\\\\").replace("]", "\\]") + "]"


def read(bracket: str | None) -> str | None:
    """The activation text of a bracket."""
    return None if bracket is None else re.sub(r"\\(.)", r"\1", bracket[1:-1], flags=re.DOTALL)


def scene_turns(text: str) -> list[tuple[str | None, str]]:
    """(activation text, scene type) of a scene that changes, in order: `logic body[So:]`; empty where it is no such."""
    turns: list[tuple[str | None, str]] = []
    position = 0
    while position < len(text):
        match = _SCENE.match(text, position)
        if match is None:
            return []
        turns.append((read(match["after"]), match["type"]))
        position = match.end()
    return turns
