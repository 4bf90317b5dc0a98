"""Writes that survive a power cut: content first, then the name, then the folder that holds the name."""

from __future__ import annotations

import os
from pathlib import Path


def sync_file(path: Path) -> None:
    """Bring a file's content to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folder(path: Path) -> None:
    """Bring a folder's names to the disk. Windows can not open folders; there a rename is durable by itself."""
    if os.name == "nt":
        return
    sync_file(path)


def write_text(path: Path, text: str) -> None:
    """Replace a file with this text, whole or not at all. What a killed writer of it left is removed."""
    for left in abandoned(path.parent, path.name):
        left.unlink(missing_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def abandoned(folder: Path, name: str = "*") -> list[Path]:
    """Partial files of a folder whose writer is no longer alive."""
    return [path for path in sorted(folder.glob(f".{name}.*.partial")) if not _is_alive(path.name.split(".")[-2])]


def _is_alive(process: str) -> bool:
    if not process.isdigit():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True
