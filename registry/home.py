"""The home: one folder that holds everything lora-rt keeps. `$LORA_RT_HOME`, or the platform's user data folder."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """The home of this process; it need not exist yet."""
    chosen = os.environ.get("LORA_RT_HOME")
    if chosen:
        return Path(chosen).expanduser().absolute()
    import platformdirs

    return Path(platformdirs.user_data_dir("lora-rt", appauthor=False))


def store(root: Path | None = None) -> Path:
    """Installed adapters."""
    return (root or home()) / "store"


def bases(root: Path | None = None) -> Path:
    """Converted and quantized bases, one folder each."""
    return (root or home()) / "bases"


def checkpoints(root: Path | None = None) -> Path:
    """Unfinished training runs."""
    return (root or home()) / "checkpoints"


def logs(root: Path | None = None) -> Path:
    """What training runs wrote for TensorBoard, a folder each."""
    return (root or home()) / "logs"
