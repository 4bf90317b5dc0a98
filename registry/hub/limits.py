"""How long the Hub may take: to accept, to answer, to send on. huggingface_hub's own client waits for ever.

A read limit alone is not enough, since one byte a second keeps it content. So every wait of a connection is counted
together with the bytes that it brought, headers, body and upload alike, and a connection that brings fewer than
`floor` bytes a second over `window` seconds of waiting is given up. Retries of one request count as one, and a Hub that
accepts and says nothing at all is not asked again. Where it asks for patience before the next try, it is said, and more
than `pause` seconds are not waited.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_rt.registry.errors import HubError
from lora_rt.registry.hub import internals, library

PIECE = 8192
_AT_ONCE = ("/api/repos/create", "/api/validate-yaml")
"""What is sent to the Hub and gives it no work."""
_LOGGER = logging.getLogger("lora_rt.registry")


@dataclass(frozen=True, slots=True)
class Limits:
    """Seconds, bytes a second, and how often one request is tried. HF_HUB_DOWNLOAD_TIMEOUT lengthens `read`.

    `answer` is for requests that make the Hub work (a commit); `floor` is about a tenth of what a modem had; `pause` is
    what the Hub may ask to wait before it is asked again.
    """

    connect: float = 10.0
    read: float = field(default_factory=lambda: max(10.0, library.seconds("HF_HUB_DOWNLOAD_TIMEOUT") or 0.0))
    answer: float = 60.0
    window: float = 30.0
    floor: float = 512.0
    tries: int = 3
    pause: float = 60.0


LIMITS = Limits()


@dataclass
class _Watch:
    """What one thread has waited for, of the request that it makes now."""

    url: str = ""
    host: str = "the Hub"
    is_open: bool = False
    patience: float = 0.0
    """Seconds that it may take to begin with an answer."""
    silence: float | None = 0.0
    """Seconds without a byte of an answer; None when it has begun."""
    waited: float = 0.0
    moved: int = 0
    arrived: int = 0
    tries: Counter[str] = field(default_factory=Counter)

    def read(self, seconds: float, size: int) -> None:
        """Add a wait for so many bytes from the Hub.

        Raises:
            HubError: too little for too long.
        """
        self.count(seconds, size, size)
        if size:
            self.silence = None
        elif self.silence is not None:
            self.silence += seconds
            if self.silence >= self.patience:
                raise self.nothing(self.silence)

    def nothing(self, seconds: float) -> HubError:
        """The error for a Hub that takes a request and says nothing."""
        return HubError(f"{self.host} has not answered for {seconds:.0f} s; given up", next_step=NEXT_STEP)

    def count(self, seconds: float, moved: int, arrived: int) -> None:
        """Add a wait that moved so many bytes, of which so many came from the Hub.

        Raises:
            HubError: too little for too long.
        """
        self.waited += seconds
        self.moved += moved
        self.arrived += arrived
        if self.waited < LIMITS.window:
            return
        if self.moved < LIMITS.floor * self.waited:
            if not self.arrived:
                raise self.nothing(self.waited)
            text = f"{self.host} sent {self.arrived:,} bytes in {self.waited:.0f} s; given up"
            raise HubError(text, next_step=NEXT_STEP)
        self.begin()

    def begin(self) -> None:
        """Count from here."""
        self.waited, self.moved, self.arrived = 0.0, 0, 0


NEXT_STEP = "Check the network and HF_ENDPOINT; with HF_HUB_OFFLINE=1 what is on this machine is used"
_THREAD = threading.local()


def _watch() -> _Watch:
    found: _Watch | None = getattr(_THREAD, "watch", None)
    if found is None:
        found = _THREAD.watch = _Watch()
    return found


def forget() -> None:
    """Start anew in this thread: what failed before does not count for what is asked now."""
    _THREAD.watch = _Watch()


def on_request(request: library.httpx2.Request) -> None:
    """Before each request: its limits, and the end of trying again.

    Raises:
        HubError: it was tried often enough, or nobody needs its answer.
    """
    if request.url.path == internals.HARNESSES:
        raise HubError("lora-rt does not need this answer", next_step=NEXT_STEP)
    watch, url = _watch(), str(request.url)
    if url != watch.url:
        watch.begin()
    watch.tries[url] = watch.tries[url] + 1 if watch.is_open and url == watch.url else 1
    watch.url, watch.host, watch.is_open = url, request.url.host, True
    if watch.tries[url] > LIMITS.tries:
        raise HubError(f"{watch.host} failed {LIMITS.tries} times in a row; given up", next_step=NEXT_STEP)
    works = request.method not in ("GET", "HEAD") and not request.url.path.endswith(_AT_ONCE)
    read = LIMITS.answer if works else LIMITS.read
    watch.patience, watch.silence = read, 0.0
    ours = {"connect": LIMITS.connect, "read": read, "write": LIMITS.answer, "pool": LIMITS.answer}
    stated: Mapping[str, float | None] = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {key: min(value, stated.get(key) or value) for key, value in ours.items()}
    request.extensions.setdefault("trace", _on_trace)


def on_response(response: library.httpx2.Response) -> None:
    """After the headers of an answer: one that the client will ask for again has not ended the request.

    Raises:
        HubError: it is not to be asked again for longer than anybody waits, or has been asked often enough.
    """
    watch = _watch()
    watch.is_open = response.status_code in (408, 429) or response.status_code >= 500
    seconds = _asked_to_wait(response) if watch.is_open else 0
    if not seconds:
        return
    told = f"{watch.host} asks to wait {seconds} s before it is asked again ({response.status_code})"
    if seconds > LIMITS.pause or watch.tries[watch.url] >= LIMITS.tries:
        raise HubError(told, next_step="Try again then; after hf auth login the Hub lets you ask more often")
    _LOGGER.warning(told)


def _asked_to_wait(response: library.httpx2.Response) -> int:
    """The seconds for which the client would sleep because the Hub says so."""
    read = library.utils.parse_ratelimit_headers  # type: ignore[attr-defined]
    limit = read(response.headers) if response.status_code == 429 else None
    if limit is not None and limit.remaining == 0:
        return limit.reset_in_seconds
    text = response.headers.get("retry-after", "").strip()
    return int(text[:9]) if text.isdecimal() else 0


def _on_trace(event: str, facts: dict[str, Any]) -> None:
    """httpcore's trace: a connection was opened, or could not be in time.

    Raises:
        HubError: nobody answers there.
    """
    if event.endswith(("connect_tcp.failed", "start_tls.failed")) and "Timeout" in type(facts["exception"]).__name__:
        raise _watch().nothing(LIMITS.connect) from facts["exception"]
    if event.endswith(("connect_tcp.complete", "start_tls.complete", "connect_unix_socket.complete")):
        _pace(facts["return_value"])


def _pace(stream: Any) -> None:
    """Count what a connection waits for. It may be used by one thread after another."""
    read: Callable[..., bytes] = stream.read
    write: Callable[..., None] = stream.write

    def paced_read(max_bytes: int, timeout: float | None = None) -> bytes:
        size, start = 0, time.monotonic()
        try:
            data = read(max_bytes, timeout=timeout)
            size = len(data)
        except BaseException:
            _watch().is_open = True
            raise
        finally:
            _watch().read(time.monotonic() - start, size)
        return data

    def paced_write(buffer: bytes, timeout: float | None = None) -> None:
        for place in range(0, len(buffer), PIECE):
            piece, start = buffer[place : place + PIECE], time.monotonic()
            write(piece, timeout=timeout)
            _watch().count(time.monotonic() - start, len(piece), 0)

    stream.read, stream.write = paced_read, paced_write
