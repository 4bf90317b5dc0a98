"""What a program gives as a setting: of which kind it is. Numbers are Python's own and those of other libraries."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from operator import index
from typing import Any


def real(value: Any) -> float | None:
    """The number that a value is, or None: also numpy's, a tensor's of one item, a fraction and a decimal."""
    if _is_none(value) or not hasattr(value, "__float__"):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # several items, or a complex one
        return None


def whole(value: Any) -> int | None:
    """The whole number that a value is, or None."""
    try:
        return None if _is_none(value) else index(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _is_none(value: Any) -> bool:
    """Whether a value is yes or no, or a text, and no number, though Python would take it for one."""
    return isinstance(value, (bool, str, bytes)) or "bool" in str(getattr(value, "dtype", ""))


_KINDS: Mapping[str, Callable[[Any], bool]] = {
    "a whole number": lambda value: whole(value) is not None,
    "a number": lambda value: real(value) is not None,
    "true or false": lambda value: isinstance(value, bool),
    "a text": lambda value: isinstance(value, str),
    "a list of texts": lambda value: isinstance(value, (list, tuple)) and all(isinstance(one, str) for one in value),
    "a mapping": lambda value: isinstance(value, Mapping),
}


def of_other_kinds(settings: object, kinds: Mapping[str, Sequence[str]], optional: Collection[str] = ()) -> list[str]:
    """What of some settings is not of its kind, in words. `kinds` names them by kind; `optional` ones may be None."""
    given = [(name, kind, getattr(settings, name)) for kind, names in kinds.items() for name in names]
    return [
        f"{name} is {value!r:.80}; it must be {kind}"
        for name, kind, value in given
        if not _KINDS[kind](value) and not (value is None and name in optional)
    ]
