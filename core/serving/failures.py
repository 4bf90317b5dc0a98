"""Errors in OpenAI's form: one object with our message, the next step in it, and the status that fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from lora_rt.core.generation.row import LengthError
from lora_rt.core.serving.protocol import ErrorBody
from lora_rt.core.serving.scheduler import ModelError, StoppedError
from lora_rt.core.serving.service import DrainingError, FullError, GoneError, TooManyError
from lora_rt.errors import LoraRtError
from lora_rt.plugins.manager import PluginError
from lora_rt.registry.errors import ChangedAdapterError, StoreError, UnknownAdapterError
from lora_rt.registry.models import Place, findings

_INVALID, _SERVER = "invalid_request_error", "server_error"
_KINDS: tuple[tuple[type[LoraRtError], int, str, str | None], ...] = (
    (FullError, 429, "rate_limit_error", "queue_full"),
    (DrainingError, 503, _SERVER, "draining"),
    (StoppedError, 503, _SERVER, "draining"),
    (TooManyError, 400, _INVALID, "too_many_answers"),
    (GoneError, 404, _INVALID, "not_in_flight"),
    (UnknownAdapterError, 404, _INVALID, "model_not_found"),
    (LengthError, 400, _INVALID, "context_length_exceeded"),
    (ModelError, 500, _SERVER, None),
    (PluginError, 500, _SERVER, None),
    (ChangedAdapterError, 500, _SERVER, None),
    (StoreError, 500, _SERVER, None),
)
RETRY_AFTER = "1"
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": what}
    for status, what in {
        400: "The request can't be understood or carried out.",
        401: "The key is missing or wrong.",
        403: "The Host of the request is not a name of this server.",
        404: "There is no such composition, adapter or answer.",
        413: "The request is too large.",
        429: "The queue is full; see Retry-After.",
        500: "The model failed on this request.",
        503: "The server is being stopped.",
    }.items()
}
"""What the OpenAPI document says of them."""


class Refusal(HTTPException):
    """A refusal before the request was looked at; `code` is OpenAI's word for it."""

    def __init__(self, status: int, message: str, code: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(status, message, dict(headers or {}))
        self.code = code


def body(status: int, message: str, code: str | None = None) -> dict[str, Any]:
    """The error object."""
    kind = next((kind for _, known, kind, _ in _KINDS if known == status), _INVALID)
    if status == 401:
        kind = "authentication_error"
    # What a client wrote may be half of a surrogate pair, which no JSON in UTF-8 can hold.
    text = message.encode("utf-8", "replace").decode()
    return {"error": {"message": text, "type": kind, "param": None, "code": code}}


def answer(
    status: int, message: str, code: str | None = None, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """The response."""
    given = dict(headers or {})
    if status == 429:
        given.setdefault("Retry-After", RETRY_AFTER)
    return JSONResponse(body(status, message, code), status, given)


def of_error(error: LoraRtError) -> tuple[int, dict[str, Any]]:
    """Status and object of an error of ours."""
    for kind, status, _, code in _KINDS:
        if isinstance(error, kind):
            return status, body(status, str(error), code)
    return 400, body(400, str(error))


def install(app: FastAPI) -> None:
    """Let every error of an application's endpoints be told in this form."""

    async def ours(_request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, LoraRtError)
        status, content = of_error(error)
        headers = {"Retry-After": RETRY_AFTER} if status in (429, 503) else {}
        if isinstance(error, ModelError):  # it would fail again; OpenAI's clients try three times unless told not to
            headers["x-should-retry"] = "false"
        return JSONResponse(content, status, headers)

    async def invalid(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, RequestValidationError)
        if "json" not in request.headers.get("content-type", ""):
            return answer(400, "The body has to be JSON, sent with Content-Type: application/json. See: /openapi.json")
        found = _as_a_whole(error.errors()) or [_problem(*finding) for finding in findings(error.errors())]
        shown = "; ".join(found[:5]) + (f"; and {len(found) - 5} more" if len(found) > 5 else "")
        return JSONResponse(body(400, f"The request can't be understood: {shown}. See: /openapi.json"), 400)

    async def http(request: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, HTTPException)
        detail = str(error.detail)
        if detail == "Not Found":
            detail = f"There is nothing at {request.method} {request.url.path[:120]}. See: /openapi.json"
        return answer(error.status_code, detail, getattr(error, "code", None), error.headers)

    async def defect(_request: Request, _error: Exception) -> JSONResponse:
        return answer(500, "This server has a defect; its log says more.")

    app.add_exception_handler(LoraRtError, ours)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(Exception, defect)


def _as_a_whole(found: Sequence[Any]) -> list[str]:
    """What is wrong with a body that is not even JSON."""
    first: Any = found[0] if len(found) == 1 else {"type": "", "loc": ()}
    if first["type"] == "json_invalid":
        return [f"it is not JSON: {first['ctx']['error']}, at character {first['loc'][-1]}"]
    return ["there is no body"] if first["type"] == "missing" and tuple(first["loc"]) == ("body",) else []


def _problem(place: Place, what: str) -> str:
    """One finding in words."""
    where = ".".join(str(part)[:60] for part in place if part != "body")
    return (f"{where}: {what}" if where else what)[:300]
