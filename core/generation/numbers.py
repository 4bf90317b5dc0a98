"""What a caller gives as a number: Python's own, and those of other libraries. True and texts are none."""

from __future__ import annotations

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
