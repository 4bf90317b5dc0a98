"""Reads training and evaluation data: JSON lines, every bad line reported at once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lora_rt.errors import LoraRtError

_SHOWN = 20


class DataError(LoraRtError):
    """A data file that can't be used; `problems` has every bad line with its number."""


def read_pairs(
    path: Path, fields: Sequence[str], check: Callable[[dict[str, Any]], list[str]] | None = None
) -> list[dict[str, Any]]:
    """The examples of a JSONL file, one object per line; blank lines are skipped.

    Args:
        path: the file, UTF-8.
        fields: keys that every line must have, non-empty strings.
        check: further findings about one example.

    Raises:
        DataError: the file can't be read, is empty, or has bad lines.
    """
    try:
        raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # which some editors put before UTF-8
    except OSError as error:
        raise DataError(f"{path} can't be read: {error.strerror}", next_step="Give a JSONL file") from error
    examples: list[dict[str, Any]] = []
    problems: list[str] = []
    for number, line in enumerate(raw.split(b"\n"), 1):
        if line.strip():
            found = _read_line(line, fields, check)
            if isinstance(found, dict):
                examples.append(found)
            else:
                problems += [f"line {number}: {problem}" for problem in found]
    if problems:
        shown = problems[:_SHOWN]
        if len(problems) > _SHOWN:
            shown.append(f"and {len(problems) - _SHOWN} more")
        keys = ", ".join(f'"{name}": "..."' for name in fields)
        raise DataError(f"{path} has {len(problems)} problems", next_step=f"Each line is {{{keys}}}", problems=shown)
    if not examples:
        raise DataError(f"{path} has no examples", next_step="Give at least one line")
    return examples


def _read_line(
    line: bytes, fields: Sequence[str], check: Callable[[dict[str, Any]], list[str]] | None
) -> dict[str, Any] | list[str]:
    """The example of one line, or what is wrong with it."""
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError:
        return ["not UTF-8"]
    except (ValueError, RecursionError) as error:
        return [f"not JSON: {error}"]
    if not isinstance(value, dict):
        return [f"a JSON {type(value).__name__}, not an object"]
    problems = []
    for name in fields:
        if name not in value:
            problems.append(f'"{name}" is missing')
        elif not isinstance(value[name], str):
            problems.append(f'"{name}" is not a text')
        elif not value[name].strip():
            problems.append(f'"{name}" is empty')
        elif any("\ud800" <= letter <= "\udfff" for letter in value[name]):
            problems.append(f'"{name}" holds half of a surrogate pair')
    if not problems and check is not None:
        problems = check(value)
    return problems or value


def digest_of(examples: Sequence[dict[str, Any]]) -> str:
    """The sha256 of the examples in their order, whatever the layout of the file; 64 hex digits."""
    text = "\n".join(json.dumps(example, sort_keys=True, ensure_ascii=False) for example in examples)
    return hashlib.sha256(text.encode()).hexdigest()
