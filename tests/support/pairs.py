"""Pairs for tests of the bridge: eight that a tiny model learns in seconds, and the source document's own."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DOCUMENT = {"scene": "тишинажарвход", "text": "Он стоял, не в силах дышать, но что-то двигалось внутри."}
PAIRS = [{"scene": letter, "text": letter * 4} for letter in "abcdefgh"]


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> Path:
    """A JSONL file."""
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    return path
