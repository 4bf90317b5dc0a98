"""Names a hook that runs in a request's own thread and does not come back.

A gate is called in every forward pass. In a thread of its own it would cost more than the pass's matmuls, and lose the
caller's inference mode; so nothing can give it up. What can be done is to say which plugin the request is waiting for.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Watch:
    """Reports calls that last longer than `seconds`, once each.

    A daemon thread looks at the running calls now and then; it ends when there were none for a while.
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
