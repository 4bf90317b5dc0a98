"""Writes that survive a power cut: content first, then the name, then the folder that holds the name."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lora_rt.registry.errors import OccupiedFolderError


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
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk is reported without one
        raise
    sync_folder(path.parent)


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder to fill, which appears as `target` when the block has ended well and is gone when it has not.

    Raises:
        OccupiedFolderError: something is there already, and it is no empty folder.
    """
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OccupiedFolderError(f"{target} is there and not empty", next_step="Give a new folder")
    parent = target.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=parent))
    try:
        yield scratch
        for file in (path for path in scratch.rglob("*") if path.is_file()):
            file.chmod(0o644)  # safetensors keeps others out, and so does mkdtemp
            sync_file(file)
        if target.exists():
            target.rmdir()
        scratch.chmod(0o755)
        os.rename(scratch, target)
        sync_folder(parent)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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
