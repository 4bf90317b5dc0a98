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
    # Not a limit: after this long a gate is named as hanging (see `Watch`).
    "lora_rt_gate": 10.0,
    "lora_rt_joint_gate": 10.0,
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a call ended: with a value, with an error, or not in time (`late`)."""

    value: Any = None
    error: BaseException | None = None
    late: bool = False


class Limits:
    """The seconds that a plugin has for its import and for each hook.

    Args:
        at_most: a bound on all of them; `$LORA_RT_PLUGIN_SECONDS`, where it is set, replaces all of them first.

    Raises:
        LoraRtError: the variable holds no positive number.
    """

    def __init__(self, at_most: float = math.inf) -> None:
        chosen = _from_environment()
        self._seconds = {what: min(chosen or seconds, at_most) for what, seconds in _SECONDS.items()}

    def __getitem__(self, what: str) -> float:
        return self._seconds[what]


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


class Watch:
    """Reports calls that last longer than `seconds`, once each: hooks that run in a request's own thread.

    A gate is called in every forward pass. In a thread of its own it would cost more than the pass's matmuls, and lose
    the caller's inference mode; so nothing can give it up. It can be said which plugin the request is waiting for. A
    daemon thread looks at the running calls now and then; it ends when there were none for a while.
    """

    def __init__(self, seconds: float, report: Callable[[str], None]) -> None:
        """`report(hook)` is called from the watching thread."""
        self._seconds = seconds
        self._report = report
        self._running: dict[object, tuple[float, str]] = {}
        self._busy = True
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    @contextmanager
    def over(self, hook: str) -> Iterator[None]:
        """Watch the block."""
        call = object()
        self._running[call] = time.monotonic(), hook
        self._busy = True
        if self._thread is None or not self._thread.is_alive():
            self._start()
        try:
            yield
        finally:
            self._running.pop(call, None)

    def _start(self) -> None:
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._look, daemon=True, name="lora-rt-watch")
                self._thread.start()

    def _look(self) -> None:
        while self._running or self._busy:
            self._busy = False
            time.sleep(self._seconds / 4)
            late = time.monotonic() - self._seconds
            for call, (started, hook) in list(self._running.items()):
                if started < late and call in self._running:
                    self._running.pop(call, (0.0, ""))  # once each
                    self._report(hook)


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
