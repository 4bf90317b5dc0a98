"""How long a plugin may take, how to give one up that takes longer, and how to name one that can't be given up."""

from __future__ import annotations

import contextvars
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lora_rt.errors import LoraRtError

SECONDS_VARIABLE = "LORA_RT_PLUGIN_SECONDS"

# Importing torch from a cold disk takes ten seconds; an objective may build tables or read files.
IMPORT = "import"
_SECONDS = {
    IMPORT: 20.0,
    "lora_rt_objective": 60.0,
    "lora_rt_mixture": 60.0,
    "lora_rt_scene": 10.0,
    "lora_rt_compose": 10.0,
    "lora_rt_static": 10.0,
    "lora_rt_commands": 5.0,
    "lora_rt_sources": 10.0,
    # Not a limit: after this long a gate is named as hanging (see `watched`).
    "lora_rt_gate": 10.0,
    "lora_rt_joint_gate": 10.0,
}

_LOOK = 1.0  # seconds at most between two looks at what runs without a limit
_IDLE = 5  # looks at nothing after which nobody looks any more


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended: with a value, with an error, or not in time (`late`)."""

    value: Any = None
    error: BaseException | None = None
    late: bool = False


def time_limits(at_most: float = math.inf) -> dict[str, float]:
    """The seconds that a plugin has for its import and for each hook, by name.

    Args:
        at_most: a bound on all of them; `$LORA_RT_PLUGIN_SECONDS`, where it is set, replaces all of them first.

    Raises:
        LoraRtError: the variable holds no positive number.
    """
    chosen = _from_environment()
    return {what: min(chosen or seconds, at_most) for what, seconds in _SECONDS.items()}


def within(seconds: float, action: Callable[[], Any]) -> Outcome:
    """Run `action` in a thread of its own and give it up after a while.

    Python can not stop a thread: one that hangs is left behind, as a daemon that does not keep the process alive. The
    thread sees the caller's context variables. Whatever the action raises, SystemExit and KeyboardInterrupt included,
    is its outcome; a Ctrl-C of the user reaches the waiting caller.
    """
    ended: list[Outcome] = []
    context = contextvars.copy_context()

    def work() -> None:
        try:
            ended.append(Outcome(value=context.run(action)))
        except BaseException as error:
            ended.append(Outcome(error=error))

    thread = threading.Thread(target=work, daemon=True, name="lora-rt-plugin")
    thread.start()
    thread.join(seconds)
    return ended[0] if ended else Outcome(late=True)


@contextmanager
def watched(seconds: float, report: Callable[[], None]) -> Iterator[None]:
    """Call `report`, once and from another thread, where the block lasts longer than so many seconds.

    A gate is called in every forward pass. In a thread of its own it would cost more than the pass's matmuls, and lose
    the caller's inference mode; so nothing can give it up. It can be said which plugin the request is waiting for: one
    daemon thread of the process looks at all running calls now and then, and ends when there were none for a while.
    """
    global _watcher
    call = object()
    with _lock:
        _running[call] = time.monotonic() + seconds, report
        if _watcher is None or not _watcher.is_alive():
            pause = min(_LOOK, seconds / 4)
            _watcher = threading.Thread(target=_look, args=[pause], daemon=True, name="lora-rt-watch")
            _watcher.start()
    try:
        yield
    finally:
        _running.pop(call, None)


_lock = threading.Lock()
_running: dict[object, tuple[float, Callable[[], None]]] = {}
_watcher: threading.Thread | None = None


def _begin_anew() -> None:
    """A fork has neither the thread nor the calls of its parent's other threads, one of which may hold the lock."""
    global _lock, _watcher
    _lock, _watcher = threading.Lock(), None
    _running.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_begin_anew)


def _look(pause: float) -> None:
    global _watcher
    idle = 0
    while idle < _IDLE:
        time.sleep(pause)
        now = time.monotonic()
        for call, (due, report) in list(_running.items()):
            if due < now and _running.pop(call, None) is not None:  # once each
                report()
        with _lock:
            idle = 0 if _running else idle + 1
            if idle == _IDLE:
                _watcher = None


def _from_environment() -> float | None:
    text = os.environ.get(SECONDS_VARIABLE, "").strip()
    if not text:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= threading.TIMEOUT_MAX:
        raise LoraRtError(f"{SECONDS_VARIABLE} is {text!r}", next_step="Give a number of seconds above 0, or unset it")
    return seconds
