"""Holds a base's chat template and tokenizer to limits before they are used: see `probe`, which does it apart."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from lora_rt.core.base import identity, probe
from lora_rt.core.base.source import BaseError

_SECONDS = 60  # on the clock; of the processor the probe gives itself few


def hold_to_limits(folder: Path) -> None:
    """Try a base's template and tokenizer in a process that can be stopped. What passed once is not tried again.

    Raises:
        BaseError: they do not come to an end, or take memory without limit.
    """
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "chat_template.json")
    files = [folder / name for name in names] + sorted((folder / "additional_chat_templates").glob("*.jinja"))
    key = "text:" + hashlib.sha256("".join(identity.sha256_of(f) for f in files if f.is_file()).encode()).hexdigest()
    if identity.recall(key) is not None:
        return
    command = [sys.executable, "-I", probe.__file__, str(folder)]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS).stdout
    except subprocess.TimeoutExpired as error:
        said = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
    if problem := said.removesuffix("\n").rpartition("\n")[2]:
        raise BaseError(f"{folder.name} can't be used: {problem}", next_step="Fetch the model again, or use another")
    identity.remember(key, "ends")
