"""JSON from strangers: bounded before it is parsed, and nothing ambiguous accepted.

The standard library's parser accepts repeated keys, NaN and half of a surrogate pair, and builds about 30 bytes of
objects per byte of `[],[],[],`. Here all of that is refused, the last by counting brackets before parsing.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

MAX_CONTAINERS = 200_000
MAX_VALUES = 1_000_000


class InvalidJsonError(ValueError):
    """Not JSON that will be read; the text says why."""


def loads(content: bytes) -> Any:
    """The value of a JSON document in UTF-8.

    Raises:
        InvalidJsonError: not UTF-8, not JSON, repeated keys, NaN or Infinity, nested too deep, or too many values.
    """
    if content.count(b"{") + content.count(b"[") > MAX_CONTAINERS or content.count(b",") > MAX_VALUES:
        raise InvalidJsonError(f"holds more than {MAX_CONTAINERS:,} lists and objects or {MAX_VALUES:,} values")
    try:
        text = content.decode("utf-8-sig")  # some editors put a mark in front
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
        if "\\ud" in text or "\\uD" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeDecodeError as error:
        raise InvalidJsonError(f"is not UTF-8 (byte {error.start})") from error
    except UnicodeEncodeError as error:
        raise InvalidJsonError("holds half of a surrogate pair") from error
    except json.JSONDecodeError as error:
        raise InvalidJsonError(f"is not JSON: {error.msg} at character {error.pos}") from error
    except RecursionError as error:
        raise InvalidJsonError("is nested too deep") from error
    except InvalidJsonError:
        raise
    except ValueError as error:  # an integer of thousands of digits
        raise InvalidJsonError(f"is not JSON that is read: {str(error)[:120]}") from error
    return value


def shown(value: object, limit: int = 100) -> str:
    """A value of a stranger's, safe to print in one line: escaped and cut."""
    try:
        text = repr(value[:limit] if isinstance(value, str) else value)
    except RecursionError:
        text = "something nested too deep"
    return text if len(text) <= limit + 20 else text[:limit] + "..."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        repeated = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise InvalidJsonError(f"repeats the key {shown(repeated)}")
    return found


def _no_constant(name: str) -> NoReturn:
    raise InvalidJsonError(f"holds {name}")
