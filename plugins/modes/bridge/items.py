"""What a bridge command works on: arguments, a JSONL file, or standard input, one item per line."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TextIO

from lora_rt.plugins.contract import LoraRtError, UsageError


class ItemsError(LoraRtError):
    """Lines that can't be read; all of them are named."""


def read_items(
    arguments: Sequence[str], data: Sequence[str] | None, field: str, stdin: TextIO | None = None
) -> list[str]:
    """The scenes or texts.

    Args:
        arguments: those of the command line; taken as they are.
        data: those of a file, where one was given.
        field: "scene" or "text".
        stdin: read where neither is given; the process's own by default. A line that is a JSON object gives its
            `field`, any other line itself.

    Raises:
        UsageError: nothing is given, or too much.
        ItemsError: lines are bad.
    """
    if arguments and data is not None:
        raise UsageError("there are both arguments and --data", next_step="Give one of them")
    if arguments:
        return list(arguments)
    if data is not None:
        return list(data)
    stdin = stdin or sys.stdin
    lines = [] if stdin.isatty() else [line.strip() for line in stdin]
    items = _read_lines([line for line in lines if line], field)
    if not items:
        raise UsageError(
            f"there is no {field}", next_step="Give it as an argument, with --data F.jsonl, or on standard input"
        )
    return items


def _read_lines(lines: Sequence[str], field: str) -> list[str]:
    items, problems = [], []
    for number, line in enumerate(lines, 1):
        found = _read_line(line, field)
        if found is None:
            problems.append(f'line {number} is not a JSON object with a "{field}": {line:.60}')
        else:
            items.append(found)
    if problems:
        raise ItemsError("standard input has lines that can't be read", problems=problems, next_step="Correct them")
    return items


def _read_line(line: str, field: str) -> str | None:
    """The item of one line, or None where it starts like a JSON object and is not a good one."""
    if not line.startswith("{"):
        return line
    try:
        value = json.loads(line).get(field)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, str) and value.strip() else None
