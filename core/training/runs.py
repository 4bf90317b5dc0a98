"""The folder of a run below the home: one process at a time, which checkpoints in it are whole, and its end."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from lora_rt.core.step.settings import SettingsError

WHOLE = "lora-rt-whole"
"""The file that is written into a checkpoint last."""


@contextmanager
def alone(run: Path) -> Iterator[None]:
    """Within the block no other process has this run.

    Raises:
        SettingsError: another one has it.
    """
    lock = FileLock(run.with_name(run.name + ".lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        text = "this very training (the same settings, base and data) is going on in another process"
        raise SettingsError(text, next_step="Wait until it is done, or give another --seed") from error
    try:
        yield
    finally:
        # While it is held: a process that opens the file afterwards makes a new one.
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()


def newest_whole(run: Path) -> Path | None:
    """The whole checkpoint of the most steps below a run's folder, or None."""
    found = []
    for folder in run.glob("checkpoint-*"):
        if (match := re.fullmatch(r"checkpoint-(\d+)", folder.name)) and (folder / WHOLE).exists():
            found.append((int(match[1]), folder))
    return max(found)[1] if found else None


def forget(run: Path) -> None:
    """Remove a run's checkpoints, and its adapter where one was kept."""
    shutil.rmtree(run, ignore_errors=True)
