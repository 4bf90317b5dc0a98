"""In front of vLLM: one name per composition, whatever else stands in a body stays, and no door to a client's paths."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from support.tiny import Zoo

Served = Callable[..., Any]


class Vllm:
    """An ASGI application that keeps what it is sent."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.scopes: list[Any] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.bodies.append(body)
        self.scopes.append(scope)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})


class Client:
    """Sends requests to a front."""

    def __init__(self) -> None:
        from lora_rt_vllm.front import Front

        self.vllm = Vllm()
        self.front = Front(self.vllm)

    def send(self, path: str, body: bytes = b"", *, method: str = "POST", pieces: int = 1) -> tuple[int, bytes]:
        """Status and body of the answer."""
        size = max(1, -(-len(body) // pieces))
        parts = [body[at : at + size] for at in range(0, len(body), size)] or [b""]
        messages = [
            {"type": "http.request", "body": part, "more_body": number < len(parts) - 1}
            for number, part in enumerate(parts)
        ]
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        scope = {"type": "http", "method": method, "path": path, "headers": headers}
        sent: list[Any] = []

        async def receive() -> Any:
            return messages.pop(0)

        async def send(message: Any) -> None:
            sent.append(message)

        asyncio.run(self.front(scope, receive, send))
        return sent[0]["status"], sent[1]["body"]

    def asked(self, model: Any, **more: Any) -> Any:
        """What vLLM is asked when a client asks for this model."""
        self.send("/v1/chat/completions", json.dumps({"model": model, **more}).encode())
        return json.loads(self.vllm.bodies[-1])


@pytest.fixture
def client(served: Served) -> Client:
    served()
    return Client()


def test_every_spelling_reaches_vllm_under_one_name(client: Client) -> None:
    spelled = ("emotion:0.7 logic:0.3", "logic:.3, emotion:0.70", "emotion:0.35 logic:0.3 emotion:0.35 body:0")
    names = {client.asked(text)["model"] for text in spelled}
    (name,) = names
    assert name.startswith("emotion:0.7 logic:0.3 #")
    assert client.asked(name)["model"] == name, "a client may send it back"


def test_the_resolver_takes_the_name_that_the_front_gives(client: Client, served: Served) -> None:
    resolver = served()
    name = client.asked("logic emotion")["model"]
    plain, named = (asyncio.run(resolver.resolve_lora("m", text)) for text in ("logic emotion", name))
    assert plain.lora_path == named.lora_path


def test_whatever_else_stands_in_the_body_stays(client: Client) -> None:
    more = {
        "messages": [{"role": "user", "content": "Größe 1e400 😀"}],
        "temperature": 0.1,
        "seed": 2**62,
        "x": None,
    }
    asked = client.asked("logic emotion", **more)
    assert {**asked, "model": ""} == {"model": "", **more}
    length = dict(client.vllm.scopes[-1]["headers"])[b"content-length"]
    assert int(length) == len(client.vllm.bodies[-1])


@pytest.mark.parametrize("model", ["base", "someone/model", "no-such-register", "emotion:warm", 7, None, ["emotion"]])
def test_what_is_no_composition_goes_on_as_it_is(client: Client, model: Any) -> None:
    """To the base, or to the resolver, which says what is wrong with it."""
    body = json.dumps({"model": model, "n": 1}).encode()
    client.send("/v1/completions", body)
    assert client.vllm.bodies == [body]


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"x"', b"\xff", b"[" * 100_000])
def test_what_is_no_document_goes_on_as_it_is(client: Client, body: bytes) -> None:
    client.send("/v1/completions", body)
    assert client.vllm.bodies == [body]


def test_a_body_may_come_in_pieces(client: Client) -> None:
    body = json.dumps({"model": "logic emotion", "prompt": "x" * 5000}).encode()
    client.send("/v1/completions", body, pieces=7)
    assert json.loads(client.vllm.bodies[-1])["model"].startswith("emotion logic #")


def test_a_changed_adapter_gets_another_name(
    client: Client, zoo: Zoo, install: Callable[..., None], monkeypatch: pytest.MonkeyPatch, served: Served
) -> None:
    from lora_rt_vllm import front

    before = client.asked("emotion")["model"]
    install("emotion", zoo.adapter("llama", seed=9, r=4, mode="output-only"))
    monkeypatch.setattr(front, "_FRESH_SECONDS", -1.0)
    after = client.asked("emotion")["model"]
    assert before != after
    assert client.asked(before)["model"] == before, "vLLM still has the old one, and may be asked for it"
    with pytest.raises(ValueError) as caught:
        asyncio.run(served().resolve_lora("m", before))
    old, new = before.partition("#")[2], after.partition("#")[2]
    assert str(caught.value) == f"the adapters of 'emotion' have changed: #{old} is #{new} now. Ask for 'emotion'"


def test_a_name_is_looked_up_once_in_a_while(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_rt_vllm.answers import Answers

    asked: list[str] = []
    name = Answers.name
    monkeypatch.setattr(Answers, "name", lambda self, given: asked.append(given) or name(self, given))
    for _ in range(3):
        client.asked("emotion")
    assert asked == ["emotion"]


@pytest.mark.parametrize(
    "path", ["/v1/load_lora_adapter", "/v1/unload_lora_adapter/", "/adapters", "/adapters/x", "/p/v1/load_lora_adapter"]
)
@pytest.mark.parametrize("method", ["POST", "DELETE", "GET"])
def test_no_client_loads_an_adapter_from_a_path(client: Client, path: str, method: str) -> None:
    status, body = client.send(path, b'{"lora_name": "x", "lora_path": "/etc"}', method=method)
    assert (status, client.vllm.bodies) == (403, [])
    assert json.loads(body)["error"]["message"] == (
        "adapters are loaded by naming a composition as the model, never from a path of a client's"
    )


def test_what_is_no_request_is_handed_on(plugin: None) -> None:
    from lora_rt_vllm.front import Front

    seen: list[str] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    asyncio.run(Front(app)({"type": "lifespan"}, None, None))
    assert seen == ["lifespan"]
