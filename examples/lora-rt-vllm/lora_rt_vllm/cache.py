"""Exports on disk: each made once, whole or not there, and none removed that a running server may name.

    CACHE/<base>/<key>/    one PEFT adapter; its name is its content, so it never changes
    CACHE/.in-use          every server that may name one of them holds a shared lock on this

vLLM's engine dies when it is asked for an adapter whose folder has gone, hours after it was loaded: so nothing is
removed while anybody holds the lock. The system gives a lock back when a process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

from lora_rt import LoraRtError

_IN_USE = ".in-use"


class ExportCache:
    """The exports under one folder, for one process of one server."""

    def __init__(self, folder: Path, most_bytes: int) -> None:
        """
        Args:
            folder: where they lie; it need not be there yet.
            most_bytes: an export is refused once they take that much.
        """
        self.folder, self.most_bytes = folder, most_bytes
        self._building: dict[Path, Future[Path]] = {}
        self._mutex = threading.Lock()
        self._held: int | None = None
        self._bytes = 0

    def get(self, name: str, write: Callable[[Path], int]) -> Path:
        """The folder of an export, made first where there is none; whoever asks meanwhile waits for that.

        Args:
            name: its name, `base/key`.
            write: makes it whole or not at all, and tells its bytes.

        Raises:
            LoraRtError: there is no room; or what `write` raises, which is tried again the next time.
        """
        target = self.folder / name
        with self._mutex:
            self._hold()
            if target.is_dir():
                os.utime(target)  # the least recently used are the first to go
                return target
            if target in self._building:
                mine, waiting = False, self._building[target]
            else:
                self._check_room()
                mine, waiting = True, Future()
                self._building[target] = waiting
        if mine:
            self._make(target, write, waiting)
        return waiting.result()

    def close(self) -> None:
        """Let go of the lock: from here on nothing is named any more."""
        with self._mutex:
            if self._held is not None:
                os.close(self._held)
                self._held = None

    def _make(self, target: Path, write: Callable[[Path], int], waiting: Future[Path]) -> None:
        try:
            made = write(target)
        except BaseException as error:
            if target.is_dir():  # another server over the same folder was first
                waiting.set_result(target)
            else:
                waiting.set_exception(error)
        else:
            waiting.set_result(target)
            with self._mutex:
                self._bytes += made
        finally:
            with self._mutex:
                del self._building[target]

    def _hold(self) -> None:
        """Say, until this process ends, that exports are in use; waits while another one tidies up."""
        if self._held is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._held = os.open(self.folder / _IN_USE, os.O_RDWR | os.O_CREAT, 0o644)
            fcntl.flock(self._held, fcntl.LOCK_SH)
            self._bytes = sum(map(_size, _entries(self.folder)))

    def _check_room(self) -> None:
        if self._bytes >= self.most_bytes:
            raise LoraRtError(
                f"the exports of this server take all of the {self.most_bytes / 1e9:g} GB that they may, "
                "and none can be removed while it runs",
                next_step="Ask for a composition that it has answered before, or have the server started anew",
            )


def tidy(folder: Path, most_bytes: int) -> list[Path] | None:
    """Remove what killed processes left behind, and the exports that were used longest ago down to this many bytes.

    The paths that are gone; None, and nothing is removed, where a server runs over this folder.
    """
    if not folder.is_dir():
        return []
    lock = os.open(folder / _IN_USE, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        gone = [path for base in _bases(folder) for path in base.glob(".*")]
        entries = sorted(_entries(folder), key=lambda path: path.stat().st_mtime_ns)
        total = sum(map(_size, entries))
        for path in entries:
            if total <= most_bytes:
                break
            total -= _size(path)
            away = path.with_name(f".{path.name}-gone")  # a kill from here on leaves nothing that looks like an export
            os.rename(path, away)
            gone.append(away)
        for path in gone:
            shutil.rmtree(path)
        return gone
    except BlockingIOError:
        return None
    finally:
        os.close(lock)


def _bases(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir()]


def _entries(folder: Path) -> list[Path]:
    return [path for base in _bases(folder) for path in base.iterdir() if not path.name.startswith(".")]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
