"""The endpoints: those of OpenAI's API, those that tell how the server does, and the operator's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse

from lora_rt.core.serving import failures
from lora_rt.core.serving.answers import Kind, new_id
from lora_rt.core.serving.answers import Response as Answer
from lora_rt.core.serving.failures import RESPONSES, Refusal
from lora_rt.core.serving.guard import Guard
from lora_rt.core.serving.preparing import Ask
from lora_rt.core.serving.protocol import AdminRequest, ChatRequest, CompletionRequest, TurnRequest
from lora_rt.core.serving.responses import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    Health,
    Model,
    Models,
    Ready,
    Turned,
    components,
    told,
)
from lora_rt.core.serving.service import Service
from lora_rt.core.serving.shelf import Shelved
from lora_rt.core.serving.speaking import Spoken, Stream, pieces, unless_gone
from lora_rt.core.serving.ticket import Events, hand_out
from lora_rt.registry.reference import BASE, check_name, composed
from lora_rt.version import __version__

# Where a request names no temperature: as `lora-rt compose` samples, since small bases loop otherwise.
_USUAL = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}
_SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty")


def make_app(service: Service) -> FastAPI:
    """The application over a service that is started and closed by somebody else."""

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        loop = asyncio.get_running_loop()
        service.scheduler.deliver = lambda events: _post(loop, events)
        yield
        service.scheduler.deliver = lambda events: None  # nobody listens any more

    app = FastAPI(title="lora-rt", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.add_middleware(Guard, service=service)
    failures.install(app)
    _asking(app, service)
    _looking(app, service)
    if service.settings.admin_key:
        _operating(app, service)
    _true_document(app)
    return app


def _post(loop: asyncio.AbstractEventLoop, events: Events) -> None:
    """Hand events out in the loop of the API."""
    loop.call_soon_threadsafe(hand_out, events)


def _asking(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", responses=told(ChatCompletion, ChatCompletionChunk), response_model=None)
    async def chat(asked: ChatRequest, request: Request) -> Response:
        """Answer a chat under a composition."""
        if len(asked.messages) > service.settings.limits.messages:
            most = service.settings.limits.messages
            raise Refusal(413, f"A chat has at most {most} messages here. Send a shorter one", "too_many_messages")
        return await _answered("chat", service, request, asked, [asked.prompt], raw=False)

    @app.post("/v1/completions", responses=told(Completion, Completion), response_model=None)
    async def complete(asked: CompletionRequest, request: Request) -> Response:
        """Go on with a text under a composition, without a chat template."""
        return await _answered("text", service, request, asked, asked.prompts, raw=True)

    @app.patch("/v1/responses-in-flight/{name}", responses=told(Turned))
    async def turn(name: str, asked: TurnRequest) -> dict[str, Any]:
        """Put an answer that is being streamed under another composition, from its next token on.

        `name` is the id that the pieces of the stream carry. What was said stays; `tokens` says how many each answer
        had when the change came into force.
        """
        told = await asyncio.wrap_future(service.turn(name, asked.model or BASE, asked.composition))
        return {"id": name, **told}


def _looking(app: FastAPI, service: Service) -> None:
    @app.get("/v1/models", responses=told(Models))
    async def models() -> dict[str, Any]:
        """The names that a composition may be made of; `model` takes whole compositions as well."""
        names = await asyncio.to_thread(service.names.known)
        bases = await asyncio.to_thread(service.names.bases)
        return {"object": "list", "data": [_model(service, name, bases.get(name)) for name in (BASE, *names)]}

    @app.get("/v1/models/{model:path}", responses=told(Model))
    async def model(model: str) -> dict[str, Any]:
        """Whether this can be used as `model`."""
        await asyncio.to_thread(service.names.composition, model)
        return _model(service, model)

    @app.get("/health", responses={200: {"model": Health}, 500: {"model": Health, "description": "It does not."}})
    async def health() -> JSONResponse:
        """Whether the process works."""
        return JSONResponse(
            {"status": "broken"} if (broken := service.scheduler.broken) else {"status": "ok"}, 500 if broken else 200
        )

    @app.get("/ready", responses={200: {"model": Ready}, 503: {"model": Ready, "description": "It is not."}})
    async def ready() -> JSONResponse:
        """Whether a request that comes now is served: not while the server is being stopped."""
        return JSONResponse({"ready": service.ready}, 200 if service.ready else 503)

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        """Figures in Prometheus' text format."""
        return Response(service.meter.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _model(service: Service, name: str, base: str | None = None) -> dict[str, Any]:
    """One entry of the list of models; `lora_rt` says what OpenAI has no field for."""
    info = service.runtime.adapters.get(name)
    facts: dict[str, Any] = {"base": service.runtime.base.id if info or base is None else base}
    if info is not None:
        facts |= {"mode": info.mode, "register": info.register, "sha256": info.sha256}
        facts |= {"scene_types": list(info.card.scene_types) if info.card else []}
    return {"id": name, "object": "model", "created": 0, "owned_by": "lora-rt", "lora_rt": facts}


def _operating(app: FastAPI, service: Service) -> None:
    """Which adapters are in memory. These endpoints have a key of their own, and are off without one."""
    shelf = service.shelf
    actions: Mapping[str, Callable[[str], Any]] = {
        "load": shelf.load,
        "pin": lambda name: shelf.load(name, pin=True),
        "unpin": shelf.unpin,
        "reload": shelf.reload,
        "unload": shelf.unload,
    }

    @app.get("/admin/adapters", responses=RESPONSES)
    async def adapters() -> dict[str, Any]:
        """The adapters in memory, and who uses them."""
        return {"adapters": [_shelved(item) for item in shelf.items()]}

    @app.post("/admin/adapters", responses=RESPONSES)
    async def change(asked: AdminRequest) -> dict[str, Any]:
        """Load, reload, pin, unpin or unload an adapter by its name in the store.

        Rows that are running keep the adapter that they began with.
        """
        name = composed(asked.name)
        check_name(name)
        await asyncio.wrap_future(service.beside(lambda: actions[asked.action](name)))
        return {"adapters": [_shelved(item) for item in shelf.items()]}


def _shelved(item: Shelved) -> dict[str, Any]:
    info = item.info
    return {
        "name": info.name,
        "mode": info.mode,
        "rank": info.rank,
        "source": info.source,
        "sha256": info.sha256,
        "bytes": item.nbytes,
        "rows": item.rows,
        "pinned": item.pinned,
    }


async def _answered(
    kind: Kind,
    service: Service,
    request: Request,
    asked: ChatRequest | CompletionRequest,
    prompts: Sequence[Any],
    *,
    raw: bool,
) -> Response:
    """The response to a request: rows are taken in, and what they say is gathered or passed on."""
    most = service.settings.limits.answers
    if len(prompts) * asked.answers > most:
        raise Refusal(400, f"A request has at most {most} answers here. Ask for fewer", "too_many_answers")
    given = {name: value for name in _SAMPLING if (value := getattr(asked, name)) is not None}
    usual = {} if "temperature" in given else _USUAL  # a temperature alone is that of plain sampling, or greedy
    sampling: dict[str, Any] = {**usual, **given, "stop": asked.stops, "min_new_tokens": asked.min_tokens or 0}
    ask = Ask(
        prompts=prompts,
        model=asked.model,
        composition=asked.composition,
        scene=asked.scene,
        sampling={**sampling, "max_new_tokens": asked.limit},
        answers=asked.answers,
        seed=asked.seed,
        likely=asked.likely,
        raw=raw,
    )
    spoken = Spoken(service, new_id(kind), request.scope["lora_rt"])
    prepared = await spoken.begin(ask)
    fingerprint = service.runtime.base.digest[:12] or service.runtime.base.id
    answer = Answer(kind, spoken.name, prepared, fingerprint, service.runtime.tokenizer, asked.likely)
    if service.settings.log_prompts:
        spoken.log["prompts"] = list(prompts)
    if asked.stream:
        counted = asked.stream_options is not None and asked.stream_options.include_usage
        return Stream(spoken, pieces(spoken, answer, counted))
    try:
        await unless_gone(request, spoken.all())
    finally:
        spoken.close()
    return JSONResponse(answer.whole(spoken.choices))


def _true_document(app: FastAPI) -> None:
    """FastAPI tells of an error 422 of its own form, which there is not here, and leaves out what is streamed."""
    made: Callable[[], dict[str, Any]] = app.openapi

    def openapi() -> dict[str, Any]:
        document = made()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        schemas |= components(ChatCompletionChunk) | components(Completion)
        return document

    app.openapi = openapi  # type: ignore[method-assign]
