"""The page at `/`: sliders, a chat, and which register acted where; its files lie in `static/` and need no network.

What the page can't ask OpenAI's API it asks here, under `/ui`. It needs the same key as `/v1`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from fastapi import FastAPI
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
from lora_rt.core.serving.service import Service
from lora_rt.errors import LoraRtError
from lora_rt.plugins.manager import UnknownModeError
from lora_rt.registry.card import AdapterCard
from lora_rt.registry.errors import UnknownAdapterError
from lora_rt.registry.reference import Reference

_FILES = Path(__file__).resolve().parent / "static"  # a development install links to the sources
_SHOWN = 4  # registers that have a slider when the page opens
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
    """Add the page and what it asks to an application. Last of all: it answers every path that nobody else does.

    Args:
        base_option: what `--base` was, for commands that are copied from the page; empty is the default base.
    """

    @app.get("/ui/state", responses=RESPONSES, include_in_schema=False)
    async def state() -> dict[str, Any]:
        """What the page begins with."""
        return await asyncio.to_thread(_state, service, base_option)

    @app.post("/ui/scenes", responses=RESPONSES, include_in_schema=False)
    async def scenes(asked: ScenesRequest) -> dict[str, Any]:
        """The scene types of a prompt: type -> share."""
        return await asyncio.wrap_future(service.beside(lambda: _scenes(service, asked.text)))

    @app.post("/ui/acted", responses=RESPONSES, include_in_schema=False)
    async def acted(asked: ActedRequest) -> dict[str, Any]:
        """How much each adapter added at each token of an answer, relative to what the base gives there."""
        return await asyncio.wrap_future(service.beside(lambda: _acted(service, asked)))

    app.mount("/", _OwnFiles(directory=_FILES, html=True), name="page")


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
    gated = [card for card in known.values() if isinstance(card, AdapterCard) and _has(service, card, "lora_rt_scene")]
    return {
        "base": runtime.base.id,
        "base_option": base_option,
        "precision": runtime.base.precision,
        "tokens": service.capacity,
        "adapters": [{"name": name, "about": _about(name, card)} for name, card in known.items()],
        "start": {name: _START if n < 2 else 0 for n, name in enumerate((plain or list(known))[:_SHOWN])},
        "scene_types": sorted({kind for card in gated for kind in card.scene_types}),
        "classifier": _recognizer(service, known),
    }


def _known(service: Service) -> dict[str, AdapterCard | str | None]:
    """What can have a slider over this base: an adapter's card, or "composition"."""
    parts = service.runtime.parts
    found: dict[str, AdapterCard | str | None] = {}
    for name in service.names.known():
        if name in parts.registry.compositions.names():
            found[name] = "composition"
        elif (resident := service.runtime.adapters.get(name)) is not None:
            found[name] = resident.card
        else:
            with suppress(LoraRtError):  # of another base, or damaged: the command line says more of it
                found[name] = parts.registry.find(Reference.parse(name), parts.base.identity, offline=True).card
    return found


def _about(name: str, card: AdapterCard | str | None) -> str:
    """A few words beside a slider; none where the name says it all."""
    if isinstance(card, str):
        return f"a named {card}"
    if card is None:
        return ""
    words = [card.register] if card.register != name else []
    return ", ".join(words + ([card.mode] if card.mode != "output-only" else []))


def _has(service: Service, card: AdapterCard, hook: str) -> bool:
    with suppress(UnknownModeError):
        return service.runtime.parts.modes.implements(card.mode, hook)
    return False


def _recognizer(service: Service, known: Mapping[str, AdapterCard | str | None]) -> str | None:
    """The first adapter by name that recognizes scene types."""
    able = (n for n, c in known.items() if isinstance(c, AdapterCard) and _has(service, c, "lora_rt_scene"))
    return next(able, None)


def _scenes(service: Service, text: str) -> dict[str, Any]:
    name = _recognizer(service, _known(service))
    if name is None:
        raise UnknownAdapterError("no adapter here recognizes scenes", next_step="Train one with --mode context")
    resident = service.shelf.load(name)
    (shares,) = service.scheduler.between(lambda: service.runtime.register_scenes([text], resident)).result()
    return {"adapter": resident, "scene_types": shares}


def _acted(service: Service, asked: ActedRequest) -> dict[str, Any]:
    composition = service.names.composition(asked.model) or Composition(())
    prompt, runtime = chat_prompt(asked.messages), service.runtime
    read = len(runtime.text.prompt_ids(prompt))
    if read + len(asked.answer) > 8 * service.capacity or read >= service.capacity:
        raise LengthError("this conversation is longer than the model takes", next_step="Begin a new one")
    for name in [str(term.reference) for term in composition.terms]:
        with suppress(LoraRtError):  # a named composition is made of others; what is wrong is said below
            service.shelf.load(name)

    def look() -> Explanation:
        return runtime.explain(prompt, composition, scene=asked.scene, answer=asked.answer)

    found = service.scheduler.between(look).result()
    told = found.document("", str(composition), asked.answer, pieces_of(runtime.tokenizer, found.ids))
    return {
        "adapters": told["adapters"],
        "scene_type": told["scene_type"],
        "tokens": told["tokens"][read:],
        "per_token": [row[read:] for row in told["per_token"]],
    }
