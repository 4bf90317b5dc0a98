"""The page at `/`: sliders, a chat, and which register acted where; its files lie in `static/` and need no network.

What the page can't ask OpenAI's API it asks here, under `/ui`. It needs the same key as `/v1`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.staticfiles import StaticFiles
from pydantic import Field
from starlette.responses import Response
from starlette.types import Scope

from lora_rt.core.generation.row import LengthError
from lora_rt.core.generation.text import pieces_of
from lora_rt.core.requests.composition import Composition
from lora_rt.core.requests.explaining import Explanation
from lora_rt.core.serving.failures import RESPONSES
from lora_rt.core.serving.protocol import STRICT, Body, Message, chat_prompt
from lora_rt.core.serving.service import FullError, Service
from lora_rt.errors import LoraRtError
from lora_rt.plugins.manager import UnknownModeError
from lora_rt.registry.card import AdapterCard
from lora_rt.registry.compositions import NamedComposition
from lora_rt.registry.errors import UnknownAdapterError
from lora_rt.registry.reference import Reference

_FILES = Path(__file__).resolve().parent / "static"  # a development install links to the sources
_SHOWN = 4  # registers that have a slider when the page opens
_LOOKS = 4  # passes for pages that are made or wait
_START = 0.5  # weight of the first two of them
_OWN_FILES_ONLY = (
    "default-src 'self'; img-src 'self' data:; base-uri 'none'; object-src 'none'; frame-ancestors 'none'; "
    "form-action 'none'"
)


class ScenesRequest(Body):
    """The body of POST /ui/scenes."""

    model_config = STRICT

    text: str = Field(min_length=1)


class ActedRequest(Body):
    """The body of POST /ui/acted: an answer, and what it was given under."""

    model_config = STRICT

    model: str
    messages: list[Message] = Field(min_length=1)
    answer: str = Field(min_length=1)
    scene: str | None = None


def install(app: FastAPI, service: Service, base_option: str = "") -> None:
    """Add the page and what it asks to an application.

    Args:
        base_option: what `--base` was, for commands that are copied from the page; empty is the default base.
    """

    looks = _Looks(service)

    @app.get("/ui/state", responses=RESPONSES, include_in_schema=False)
    async def state() -> dict[str, Any]:
        """What the page begins with."""
        return await asyncio.to_thread(_state, service, base_option)

    @app.post("/ui/scenes", responses=RESPONSES, include_in_schema=False)
    async def scenes(asked: ScenesRequest) -> dict[str, Any]:
        """The scene types of a prompt: type -> share."""
        with looks:
            name, look = await asyncio.wrap_future(service.beside(lambda: _scenes(service, asked.text)))
            return {"adapter": name, "scene_types": await asyncio.wrap_future(service.scheduler.between(look))}

    @app.post("/ui/acted", responses=RESPONSES, include_in_schema=False)
    async def acted(asked: ActedRequest) -> dict[str, Any]:
        """How much each adapter added at each token of an answer, relative to what the base gives there."""
        with looks:
            look = await asyncio.wrap_future(service.beside(lambda: _acted(service, asked)))
            found = await asyncio.wrap_future(service.scheduler.between(look))
        return await asyncio.to_thread(_told, service, found, asked.answer)

    files = _OwnFiles(directory=_FILES)

    async def file(request: Request) -> Response:
        """One file of the page."""
        return await files.get_response(request.url.path[1:] or "index.html", request.scope)

    # Each by its name, and not all of "/": what nobody else answers is told as it is without the page.
    for path in ("", *sorted(item.name for item in _FILES.iterdir())):
        app.add_route(f"/{path}", file, methods=["GET", "HEAD"], include_in_schema=False)


class _Looks:
    """How many of the page's passes are asked for: each is made between two steps of everybody's answers."""

    def __init__(self, service: Service) -> None:
        self._service, self._now = service, 0

    def __enter__(self) -> None:
        if self._now >= _LOOKS or not self._service.ready:
            self._service.check_open()
            text = f"{self._now} passes for pages are being made or wait"
            raise FullError(text, next_step="Send the request again in a moment")
        self._now += 1

    def __exit__(self, *_failure: object) -> None:
        self._now -= 1


class _OwnFiles(StaticFiles):
    """The page's files; a browser is told to run no script but these."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers["Content-Security-Policy"] = _OWN_FILES_ONLY
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        response.headers["Cache-Control"] = "no-cache"  # a newer lora-rt has newer files under the same names
        return response


def _state(service: Service, base_option: str) -> dict[str, Any]:
    runtime = service.runtime
    known = _known(service)
    plain = [name for name, card in known.items() if isinstance(card, AdapterCard) and card.mode == "output-only"]
    able = {name: card for name, card in known.items() if _recognizes(service, card)}
    return {
        "base": runtime.base.id,
        "base_option": base_option,
        "precision": runtime.base.precision,
        "tokens": service.preparer.capacity,
        "adapters": [{"name": name, "about": _about(name, card)} for name, card in known.items()],
        "start": {name: _START if n < 2 else 0 for n, name in enumerate((plain or list(known))[:_SHOWN])},
        "scene_types": sorted({kind for card in able.values() if card is not None for kind in card.scene_types}),
        "classifier": next(iter(able), None),
    }


def _known(service: Service) -> dict[str, AdapterCard | NamedComposition | None]:
    """What can have a slider over this base, by name: first adapters, then named compositions."""
    named = service.runtime.parts.registry.compositions
    adapters: dict[str, AdapterCard | None] = {}
    compositions: dict[str, NamedComposition] = {}
    for name in service.names.known():
        with suppress(LoraRtError):  # of another base, or damaged: the command line says more of it
            if (found := named.look_up(name)) is None:
                adapters[name] = _card(service, name)
            else:
                for term in found.terms:
                    _card(service, term.reference)
                compositions[name] = found
    return adapters | compositions


def _card(service: Service, reference: str) -> AdapterCard | None:
    """What an adapter says of itself.

    Raises:
        LoraRtError: it is not here, or of another base.
    """
    parts = service.runtime.parts
    if (resident := service.runtime.adapters.get(reference)) is not None:
        return resident.card
    return parts.registry.find(Reference.parse(reference), parts.base.identity, offline=True).card


def _about(name: str, card: AdapterCard | NamedComposition | None) -> str:
    """A few words beside a slider; none where the name says it all."""
    if card is None:
        return ""
    if isinstance(card, NamedComposition):
        return ", ".join(["a named composition", *([card.mode] if card.mode else [])])
    words = [card.register] if card.register != name else []
    return ", ".join(words + ([card.mode] if card.mode != "output-only" else []))


def _recognizes(service: Service, card: AdapterCard | NamedComposition | None) -> bool:
    """Whether its mode tells the scene types of prompts."""
    if card is None or not card.mode:
        return False
    with suppress(UnknownModeError):
        return service.runtime.parts.modes.implements(card.mode, "lora_rt_scene")
    return False


def _scenes(service: Service, text: str) -> tuple[str, Callable[[], dict[str, float]]]:
    """Who recognizes the scene types of a text, and how; the second is for the model's thread."""
    service.preparer.check_letters(text)
    _check_length(service, len(service.runtime.text.prompt_ids(text)))
    able = (name for name, card in _known(service).items() if _recognizes(service, card))
    name = next(able, None)
    if name is None:
        raise UnknownAdapterError("nothing here recognizes scenes", next_step="Train one with --mode context")
    if service.runtime.parts.registry.compositions.look_up(name) is None:
        name = service.shelf.load(name)
    return name, lambda: service.runtime.register_scenes([text], name)[0]


def _check_length(service: Service, tokens: int) -> None:
    """What is shown beside answers is made in one pass, which the answers wait for.

    Raises:
        LengthError: they would wait for long.
    """
    if tokens > service.preparer.capacity:
        raise _too_long()
    most = 2 * service.settings.limits.reading
    if tokens > most:
        text = f"the page looks into at most {most} tokens, and this has {tokens}"
        raise LengthError(text, next_step="Use a shorter text, or begin a new conversation")


def _too_long() -> LengthError:
    return LengthError("this conversation is longer than the model takes", next_step="Begin a new conversation")


def _acted(service: Service, asked: ActedRequest) -> Callable[[], Explanation]:
    """How the pass is explained, for the model's thread; what it needs is loaded."""
    composition = service.names.composition(asked.model) or Composition(())
    prompt, runtime = chat_prompt(asked.messages), service.runtime
    try:
        service.preparer.check_letters(prompt)
        service.preparer.check_letters(asked.answer)
    except LengthError as error:
        raise _too_long() from error
    _check_length(service, len(runtime.text.prompt_ids(prompt)) + len(runtime.text.text_ids(asked.answer)))
    for name in [str(term.reference) for term in composition.terms]:
        with suppress(LoraRtError):  # a named composition is made of others; what is wrong is said below
            service.shelf.load(name)

    return lambda: runtime.explain(prompt, composition, scene=asked.scene, answer=asked.answer)


def _told(service: Service, found: Explanation, answer: str) -> dict[str, Any]:
    """What an explanation says of the answer's tokens, which are the last ones."""
    runtime = service.runtime
    told = found.document("", "", answer, pieces_of(runtime.tokenizer, found.ids))
    read = len(found.ids) - len(runtime.text.text_ids(answer))
    return {
        "adapters": told["adapters"],
        "scene_type": told["scene_type"],
        "tokens": told["tokens"][read:],
        "per_token": [row[read:] for row in told["per_token"]],
    }
