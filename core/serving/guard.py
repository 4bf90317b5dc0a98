"""What is decided before a body is read: the key, whether there is room, how large a request may be, and its log."""

from __future__ import annotations

import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from lora_rt.core.serving import failures
from lora_rt.core.serving.failures import Refusal
from lora_rt.core.serving.service import Service
from lora_rt.core.serving.settings import is_loopback
from lora_rt.errors import LoraRtError

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_log = logging.getLogger("lora_rt.serving.requests")
_OPEN = ("/health", "/ready")
ASKING = ("/v1/chat/completions", "/v1/completions")
_COUNTED = (*ASKING, *_OPEN, "/v1/models", "/metrics")
"""Paths whose requests are counted by their names, whatever refuses them."""


class Guard:
    """Stands before the application.

    A queue that is full is told so at once, whatever the body would be: under a load of ten times what the model
    carries, a refusal has to cost next to nothing.
    """

    def __init__(self, app: App, service: Service) -> None:
        self._app = app
        self._service = service
        self._settings = service.settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 500
        scope["lora_rt"] = {}

        async def sent(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is not None:
                headers = refusal.headers or {}
                answer = failures.answer(refusal.status_code, str(refusal.detail), refusal.code, headers)
                await answer(scope, receive, sent)
            else:
                await self._app(scope, self._bounded(receive), sent)
        finally:
            self._note(scope, status, time.monotonic() - began)

    def _refusal(self, scope: Scope) -> Refusal | None:
        path, headers = scope["path"], {key.lower(): value for key, value in scope["headers"]}
        if not self._settings.api_key and self._settings.loopback and not _is_local(headers.get(b"host", b"")):
            # A page of the web whose name leads to this machine: a browser would let it ask us.
            return Refusal(403, "This server is for this machine alone. Start it with --api-key", "wrong_host")
        if path.startswith("/admin"):
            if not self._settings.admin_key:
                return Refusal(404, "There is no /admin here. Start the server with --admin-key", "no_admin")
            if not _holds(headers, self._settings.admin_key):
                return Refusal(401, "Send the admin key as Authorization: Bearer ...", "invalid_api_key")
        elif (path.startswith(("/v1", "/ui/")) or path == "/metrics") and not self._may_ask(headers):
            return Refusal(401, "Send the key of this server as Authorization: Bearer ...", "invalid_api_key")
        if path in ASKING and scope["method"] == "POST":
            try:
                self._service.check_open()
            except LoraRtError as error:
                status, content = failures.of_error(error)
                detail = content["error"]
                return Refusal(status, detail["message"], detail["code"], {"Retry-After": failures.RETRY_AFTER})
        length = headers.get(b"content-length", b"0")
        return self._too_large() if not length.isdigit() or int(length) > self._settings.limits.body else None

    def _may_ask(self, headers: MutableMapping[bytes, bytes]) -> bool:
        return not self._settings.api_key or _holds(headers, self._settings.api_key)

    def _bounded(self, receive: Receive) -> Receive:
        """The same, up to the largest body."""
        read = 0

        async def bounded() -> MutableMapping[str, Any]:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if read > self._settings.limits.body:
                raise self._too_large()
            return message

        return bounded

    def _too_large(self) -> Refusal:
        most = self._settings.limits.body
        return Refusal(413, f"A request has at most {most} bytes here. Send a shorter one", "request_too_large")

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        """One line per request: no prompts unless the operator asked for them."""
        path = scope["path"]
        route = getattr(scope.get("route"), "path", "") or (path if path in _COUNTED else "")
        failed = scope["lora_rt"].get("failed", status)  # of a stream that began well
        self._service.meter.requests.labels(route or "other", str(failed)).inc()
        if path in _OPEN or path == "/metrics":
            return
        client = scope.get("client")
        facts = {"method": scope["method"], "path": path[:200], "status": status, "seconds": round(seconds, 4)}
        facts |= {"client": client[0] if client else None, **scope["lora_rt"]}
        _log.info("%s", json.dumps(facts, ensure_ascii=True))


def _holds(headers: MutableMapping[bytes, bytes], key: str) -> bool:
    scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
    return scheme.lower() == b"bearer" and hmac.compare_digest(given.strip(), key.strip().encode())


def _is_local(host: bytes) -> bool:
    name = host.decode("latin-1").lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0].removesuffix(".")
    return name in ("localhost", "") or is_loopback(name)
