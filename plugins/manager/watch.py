"""Names a hook that runs in a request's own thread and does not come back.

A gate is called in every forward pass. In a thread of its own it would cost more than the pass's matmuls, and lose the
caller's inference mode; so nothing can give it up. What can be done is to say which plugin the request is waiting for.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Watch:
    """Reports calls that last longer than `seconds`, once each.

    A daemon thread looks at the running calls now and then; it ends when there were none for a while.
    """

    def __init__(self, seconds: float, report: Callable[[str, str], None]) -> None:
        """`report(mode, hook)` is called from the watching thread."""
        self._seconds = seconds
        self._report = report
        self._numbers = itertools.count()
        self._running: dict[int, tuple[float, str, str]] = {}
        self._begun = 0
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()

    @contextmanager
    def over(self, mode: str, hook: str) -> Iterator[None]:
        """Watch the block."""
        number = next(self._numbers)
        self._begun = number
        self._running[number] = (time.monotonic(), mode, hook)
        if self._thread is None or not self._thread.is_alive():
            self._start()
        try:
            yield
        finally:
            del self._running[number]

    def _start(self) -> None:
        with self._lock:
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._look, daemon=True, name="lora-rt-watch")
                self._thread.start()

    def _look(self) -> None:
        reported: set[int] = set()
        seen = -1
        while self._running or self._begun != seen:
            seen = self._begun
            time.sleep(self._seconds / 4)
            late = time.monotonic() - self._seconds
            for number, (started, mode, hook) in list(self._running.items()):
                if started < late and number not in reported:
                    reported.add(number)
                    self._report(mode, hook)
