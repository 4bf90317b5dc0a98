"""How a base is named in a hint: by a text that `--base` takes from here."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

DEFAULT_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""The Hub's name of the default base, which `--base default` means."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def use_base(base_id: str) -> str:
    """The sentence that says how to come to a base.

    Args:
        base_id: as cards have it: a Hub id, or the name that a local folder or file had.
    """
    if base_id == DEFAULT_ID:
        return "Use --base default"
    for local in (Path(base_id), Path(f"{base_id}.gguf")):
        if (local / "config.json").is_file() or (local.suffix == ".gguf" and local.is_file()):
            return f"Use --base {shlex.quote(str(local) if local.is_absolute() else f'./{local}')}"
    if _HUB_ID.fullmatch(base_id):
        return f"Use --base {base_id}"
    return f"Give --base the folder or file of {base_id}"
