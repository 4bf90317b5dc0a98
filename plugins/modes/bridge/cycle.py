"""Cycle training's data: texts or scenes that have no partner get one from the bridge itself (back-translation).

What the bridge made is only ever the prompt, and what was given is the target: a text teaches expanding, a scene
teaches compressing. Train on the pairs and these lines together; repeat for another turn of the cycle.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_rt.plugins.contract import UsageError
from lora_rt.plugins.modes.bridge.hyper import BridgeError, HyperBridge


def cycle_pairs(
    bridge: HyperBridge, texts: Sequence[str] = (), scenes: Sequence[str] = (), **sampling: Any
) -> list[dict[str, str]]:
    """Training lines {"scene", "text", "direction"}, each for one direction; `sampling` as of `HyperBridge.expand`.

    Lines whose made half is empty are left out.

    Raises:
        UsageError: there are neither texts nor scenes.
        BridgeError: some are empty.
    """
    check_items(texts, scenes)
    made_scenes, made_texts = bridge.compress(list(texts), **sampling), bridge.expand(list(scenes), **sampling)
    lines = [{"scene": s, "text": t, "direction": "expand"} for s, t in zip(made_scenes, texts, strict=True)]
    lines += [{"scene": s, "text": t, "direction": "compress"} for s, t in zip(scenes, made_texts, strict=True)]
    return [line for line in lines if line["scene"] and line["text"]]


def check_items(texts: Sequence[str], scenes: Sequence[str]) -> None:
    """Raises UsageError where there are neither texts nor scenes."""
    if not texts and not scenes:
        raise UsageError("there are neither texts nor scenes", next_step="Give --texts or --scenes")


def check_new_file(path: Path) -> None:
    """Raise what `write_lines` would raise, before minutes are spent on the lines.

    Raises:
        BridgeError: the file is there already, or can't be written.
    """
    if os.path.lexists(path):
        raise BridgeError(f"{path} is there already", next_step="Give a new file with --out")
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent), suppress(FileNotFoundError):
            os.lstat(path)  # a name may be too long
    except OSError as error:
        raise BridgeError(f"{path} can't be written: {error.strerror}", next_step="Give another --out") from error


def write_lines(path: Path, lines: Sequence[Mapping[str, str]]) -> None:
    """Write a new JSONL file, whole or not at all. Where that fails, the lines go into a temporary one.

    Raises:
        BridgeError: the file is there already, or can't be written; it says where the lines are.
    """
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    made = False
    try:
        with path.open("x", encoding="utf-8") as file:
            made = True
            file.write(text)
    except OSError as error:
        if made:
            path.unlink(missing_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", prefix="cycle-", suffix=".jsonl", delete=False) as kept:
            kept.write(text)
        there = isinstance(error, FileExistsError)
        problem = f"{path} is there already" if there else f"{path} can't be written: {error.strerror}"
        raise BridgeError(problem, next_step=f"Nothing is lost: the lines are in {kept.name}") from error
