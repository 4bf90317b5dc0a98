"""Kill a process at its Nth step that touches the disk, for every N.

The steps are what Python's audit events report (open, rename, mkdir, remove, flock, ...) and every fsync. The process
is a fork, so that a step costs milliseconds, and it dies by SIGKILL: no handler, no `finally`, no flush.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

EVENTS = {
    "open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.utime",
    "os.truncate", "os.listdir", "os.scandir", "fcntl.flock",
}  # fmt: skip
SURVIVED, FAILED = 0, 3


def run_until(step: int, action: Callable[[], object], within: tuple[Path, ...]) -> bool:
    """Run the action in a fork that is killed at this step (counted from 1); whether it lived to its end."""
    child = os.fork()
    if child == 0:
        _child(step, action, tuple(str(path) for path in within))
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
        return False
    assert os.waitstatus_to_exitcode(status) == SURVIVED, "the action failed by itself"
    return True


def _child(step: int, action: Callable[[], object], within: tuple[str, ...]) -> None:
    left = [step]

    def count() -> None:
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def hear(event: str, arguments: tuple[object, ...]) -> None:
        if event in EVENTS and (event == "fcntl.flock" or str(arguments[0]).startswith(within)):
            count()

    fsync = os.fsync

    def counted(descriptor: int) -> None:
        count()
        fsync(descriptor)

    os.fsync = counted  # type: ignore[assignment]
    sys.addaudithook(hear)
    try:
        action()
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
        os._exit(FAILED)
    os._exit(SURVIVED)
