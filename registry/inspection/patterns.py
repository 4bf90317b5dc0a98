"""Regular expressions from strangers, read without a chance to hang.

PEFT lets a configuration choose modules with a regex. Python's engine backtracks, so a few bytes can cost years. Only a
tame dialect is compiled: text, `.`, classes, groups, alternatives and at most six repeats of a single character,
each followed by literal text. No repeat applies to a group, nothing is optional, nothing looks around or back.
The names it is matched with come from the base and are short, which bounds the work.
"""

from __future__ import annotations

import re

MAX_LENGTH = 1_000
MAX_REPEATS = 6

_TOKEN = re.compile(
    r"(?P<repeat>(?:\.|\\[dw]|\[(?:[A-Za-z0-9_\-]|\\[dw])+\])(?:[*+]\??|\{\d{1,2},\d{0,2}\}))"
    r"|(?P<literal>[A-Za-z0-9_\-]|\\[.\-])"
    r"|(?P<structure>\((?:\?:)?|\)|\||\^|\$|\\b)"
    r"|(?P<one>\.|\\[dw]|\[(?:[A-Za-z0-9_\-]|\\[dw])+\])"
)


def compile_tame(pattern: str) -> re.Pattern[str] | None:
    """The pattern compiled, or None where it is outside of the dialect or no regex at all."""
    if len(pattern) > MAX_LENGTH or not _is_tame(pattern):
        return None
    try:
        return re.compile(pattern)
    except re.error:
        return None


def peft_key(pattern: str) -> re.Pattern[str] | None:
    """A key of `rank_pattern` or `alpha_pattern` as PEFT matches it, `(.*\\.)?(KEY)$`; None where it is not tame."""
    return re.compile(rf"(.*\.)?({pattern})$") if compile_tame(pattern) else None


def _is_tame(pattern: str) -> bool:
    """Whether every repeat meets literal text before the next one, on every way through the alternatives."""
    position, repeats, is_open = 0, 0, False
    groups: list[tuple[bool, bool]] = [(False, False)]  # (open at the group's start, open at an alternative's end)
    while position < len(pattern):
        token = _TOKEN.match(pattern, position)
        if token is None:
            return False
        position = token.end()
        if token.lastgroup == "repeat":
            if is_open:
                return False
            repeats, is_open = repeats + 1, True
        elif token.lastgroup == "literal":
            is_open = False
        elif token[0] in ("(", "(?:"):
            groups.append((is_open, False))
        elif token[0] == "|":
            groups[-1] = (groups[-1][0], groups[-1][1] or is_open)
            is_open = groups[-1][0]
        elif token[0] == ")":
            is_open = groups.pop()[1] or is_open
            if not groups:
                return False
    return repeats <= MAX_REPEATS
