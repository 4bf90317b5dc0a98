"""The process of a server: its socket, its log, and a way to end that leaves no answer half told."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import time
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn

from lora_rt.core.runtime import Runtime
from lora_rt.core.serving.api import make_app
from lora_rt.core.serving.service import Service
from lora_rt.core.serving.settings import ServeSettings
from lora_rt.core.serving.settings import listen as listen

if TYPE_CHECKING:
    from collections.abc import Callable

    from fastapi import FastAPI

_log = logging.getLogger("lora_rt.serving")
_LAST_WORDS = 0.5  # seconds
_TICK = 0.05  # seconds between two looks at whether the last answer is done
# Seconds for which an idle connection is kept: longer than clients keep theirs (httpx: 5). Were it as long, a server
# would close now and then what a client is just about to use, and the client could not know whether it was heard.
KEPT = 75


class DrainingServer(uvicorn.Server):
    """The first signal lets running answers end and refuses new ones (503); the second ends at once."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self._service = service
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to end."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come."""
        if self._service.draining or self._loop is None:
            super().handle_exit(sig, frame)
            return
        self._service.draining = True
        _log.info("signal %d: no new requests, and %d answers to end", sig, self._service.busy)
        self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._draining = asyncio.ensure_future(self._until_idle())

    async def _until_idle(self) -> None:
        end = time.monotonic() + self._service.settings.drain
        while self._service.busy and time.monotonic() < end:
            await asyncio.sleep(_TICK)
        if self._service.busy:  # whoever is not done is told so, and has a moment to pass it on
            await asyncio.to_thread(self._service.scheduler.stop)
            await asyncio.sleep(_LAST_WORDS)
        self.should_exit = True


def configured(app: FastAPI, patience: int) -> uvicorn.Config:
    """How the application is served; connections get so many seconds to end in."""
    return uvicorn.Config(
        app,
        http="h11",  # httptools knows no bound on headers, which come before any key is looked at
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=patience,
        timeout_keep_alive=KEPT,
        lifespan="on",
    )


def serve(
    runtime: Runtime,
    settings: ServeSettings,
    bound: socket.socket,
    *,
    announce: Callable[[str], None],
    extend: Callable[[FastAPI, Service], None] | None = None,
) -> None:
    """Serve until a signal comes.

    Args:
        runtime: loaded; it is not closed.
        bound: from `listen`.
        announce: told the address when requests are served.
        extend: adds to the application before it starts.

    Raises:
        LoraRtError: a pinned adapter can't be loaded.
    """
    service = Service(runtime, settings)
    app = make_app(service)
    if extend is not None:
        extend(app, service)
    service.start()
    host, port = bound.getsockname()[:2]
    try:
        config = configured(app, 5)
        bound.listen(config.backlog)  # whoever reads the address and comes at once waits, and is not refused
        announce(f"http://{f'[{host}]' if ':' in host else host}:{port}")
        DrainingServer(config, service).run(sockets=[bound])
    finally:
        service.close()


def log_to_stderr() -> None:
    """One line per request, as JSON, on standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    for name in ("lora_rt.serving", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.propagate = False
    logging.getLogger("lora_rt.serving").setLevel(logging.INFO)
    logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
