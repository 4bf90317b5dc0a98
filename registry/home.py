"""The home: one folder that holds everything lora-rt keeps. `$LORA_RT_HOME`, or the platform's user data folder."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lora_rt.registry import durable
from lora_rt.registry.errors import StorageError


def home() -> Path:
    """The home of this process; it need not exist yet.

    Raises:
        StorageError: it is to lie in the home of a user that this machine does not have.
    """
    chosen = os.environ.get("LORA_RT_HOME")
    if chosen:
        try:
            return Path(chosen).expanduser().absolute()
        except RuntimeError as error:
            text = f"LORA_RT_HOME is {chosen}, and this machine has no such user"
            raise StorageError(text, next_step="Set it to a folder of yours") from error
    import platformdirs

    return Path(platformdirs.user_data_dir("lora-rt", appauthor=False))


def store(root: Path | None = None) -> Path:
    """Installed adapters."""
    return (root or home()) / "store"


def bases(root: Path | None = None) -> Path:
    """Converted and quantized bases, one folder each."""
    return (root or home()) / "bases"


def checkpoints() -> Path:
    """Unfinished training runs."""
    return home() / "checkpoints"


def logs() -> Path:
    """What training runs wrote for TensorBoard, a folder each."""
    return home() / "logs"


def kernels() -> Path:
    """What was compiled for this processor."""
    return home() / "kernels"


def remembered(file: str) -> dict[str, Any]:
    """The JSON object that `remember` wrote into a file of the home; empty where there is none that can be read."""
    try:
        found = json.loads((home() / file).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def remember(file: str, document: Mapping[str, Any]) -> None:
    """Keep what later processes need not find again. Two at once may lose what the other one found.

    A home that can't be written costs time alone.
    """
    with suppress(OSError):
        (home() / file).parent.mkdir(parents=True, exist_ok=True)
        durable.write_text(home() / file, json.dumps(document, indent=1))
