"""In front of vLLM's API (`--middleware lora_rt_vllm.front.Front`): one spelling per composition, and closed doors.

The doors: what lets compositions be resolved at run time (VLLM_ALLOW_RUNTIME_LORA_UPDATING) also opens routes that load
an adapter from a path of the client's choice. They answer 403 here, whoever asks.

The spelling: vLLM keeps an adapter, a place in its memory and a part of its prefix cache per *name*. What a client
calls `model` is rewritten to the composition's one name, which carries a mark of the files that it stands for; a name
that can't be rewritten goes on as it is, and the resolver says what is wrong with it, to those whom vLLM lets in.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

CLOSED = frozenset({"load_lora_adapter", "unload_lora_adapter", "adapters"})
"""Parts of the paths that load and unload adapters: vLLM's own two, and those that it has for SageMaker."""

_MOST_BYTES = 16 << 20  # larger bodies hold images, and are not read twice
_FRESH_SECONDS = 1.0  # how long a changed adapter may go unnoticed
_KEPT = 4096


class Front:
    """An ASGI application around vLLM's."""

    def __init__(self, app: App) -> None:
        self.app = app
        self._names: dict[str, tuple[float, str]] = {}

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Close, rewrite, or hand on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
        elif CLOSED & set(scope["path"].split("/")):
            await _refuse(send)
        elif scope["method"] == "POST" and 0 < _length(scope) <= _MOST_BYTES:
            await self._renamed(scope, receive, send)
        else:
            await self.app(scope, receive, send)

    async def _renamed(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        messages = [await receive()]
        while messages[-1]["type"] == "http.request" and messages[-1].get("more_body"):
            messages.append(await receive())
        body = b"".join(message.get("body", b"") for message in messages)
        if messages[-1]["type"] == "http.request" and (changed := await self._body(body)) is not None:
            messages = [{"type": "http.request", "body": changed, "more_body": False}]
            headers = [(name, value) for name, value in scope["headers"] if name != b"content-length"]
            scope = {**scope, "headers": [*headers, (b"content-length", str(len(changed)).encode())]}
        waiting = iter(messages)

        async def again() -> Message:
            return next(waiting, None) or await receive()

        await self.app(scope, again, send)

    async def _body(self, body: bytes) -> bytes | None:
        """The body under the composition's one name; None where there is nothing to change."""
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            return None
        given = document.get("model") if isinstance(document, dict) else None
        if not isinstance(given, str):
            return None
        name = await self._name(given)
        return None if name == given else json.dumps({**document, "model": name}).encode()

    async def _name(self, given: str) -> str:
        known = self._names.get(given)
        if known is None or time.monotonic() - known[0] > _FRESH_SECONDS:
            known = time.monotonic(), await asyncio.to_thread(_name, given)
            if len(self._names) >= _KEPT:
                self._names.clear()
            self._names[given] = known
        return known[1]


def _name(given: str) -> str:
    from lora_rt import LoraRtError
    from lora_rt_vllm.shared import answers

    own = answers()
    if given in own.settings.names:
        return given
    try:
        return own.name(given)
    except LoraRtError:
        return given


def _length(scope: MutableMapping[str, Any]) -> int:
    stated = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
    return int(stated) if stated.isdigit() else 0


async def _refuse(send: Send) -> None:
    error = {
        "message": "adapters are loaded by naming a composition as the model, never from a path of a client's",
        "type": "PermissionDeniedError",
        "param": None,
        "code": 403,
    }
    body = json.dumps({"error": error}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 403, "headers": headers})
    await send({"type": "http.response.body", "body": body})
