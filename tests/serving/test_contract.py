"""The OpenAPI document is true, and no request that it describes, or nearly describes, makes the server fail."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.generation.modes import GenerationMode

from lora_rt.core.generation.row import TokenScore
from lora_rt.core.serving import responses
from lora_rt.core.serving.answers import Choice, Response
from lora_rt.core.serving.protocol import ErrorBody
from support.serving import Live

pytestmark = pytest.mark.slow

ADMIN = "the operator's own"
UNHURRIED = settings(
    max_examples=12,
    derandomize=True,
    phases=[Phase.generate],
    deadline=None,
    suppress_health_check=list(HealthCheck),
    database=None,
)
ENDPOINTS = {
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/completions"),
    ("PATCH", "/v1/responses-in-flight/{name}"),
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model}"),
    ("GET", "/health"),
    ("GET", "/ready"),
    ("GET", "/admin/adapters"),
    ("POST", "/admin/adapters"),
}


def test_the_document_names_every_endpoint_and_only_errors_in_openais_form(server: Live) -> None:
    document = server.app.openapi()
    found = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert found == ENDPOINTS
    assert "422" not in json.dumps(document)
    assert set(document["components"]["schemas"]["ErrorDetail"]["properties"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(("method", "path"), sorted(ENDPOINTS))
def test_no_request_makes_the_server_fail(server: Live, method: str, path: str) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operation = schema[path][method]
    headers = {"Authorization": f"Bearer {ADMIN}"} if path.startswith("/admin") else {}

    def ask(case: Any) -> None:
        if isinstance(case.body, dict) and isinstance(case.body.get("max_tokens"), int):
            case.body["max_tokens"] = min(case.body["max_tokens"], 4)
        answer = case.call(headers=headers)
        assert answer.status_code < 500, answer.text
        if answer.status_code >= 400:
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

    wrong = [GenerationMode.NEGATIVE] if method != "GET" else []  # there is nothing that could be wrong in a GET
    for mode in (GenerationMode.POSITIVE, *wrong):
        UNHURRIED(given(case=operation.as_strategy(generation_mode=mode))(ask))()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("scored", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_what_is_told_has_the_form_that_the_document_names(server: Live, path: str, stream: bool, scored: bool) -> None:
    """All of it and no more, in whole answers and in each event of a stream."""
    chat = "chat" in path
    asked: dict[str, Any] = {"model": "one:0.7 two:0.3", "temperature": 0, "max_tokens": 6, "n": 2, "stream": stream}
    asked |= {"messages": [{"role": "user", "content": "rain"}]} if chat else {"prompt": "rain"}
    asked |= ({"logprobs": True, "top_logprobs": 2} if chat else {"logprobs": 2}) if scored else {}
    asked |= {"stream_options": {"include_usage": True}} if stream else {}
    document = server.app.openapi()
    with server.http() as http:
        answer = http.post(path, json=asked)
    told = document["paths"][path]["post"]["responses"]["200"]["content"]
    kind = answer.headers["content-type"].partition(";")[0]
    schema = told[kind]["schema"]
    name = (schema["anyOf"][0] if stream else schema)["$ref"].rpartition("/")[2]
    assert name in document["components"]["schemas"]
    form = getattr(responses, name)
    if not stream:
        found = form.model_validate(answer.json())
        assert found.usage.total_tokens == found.usage.prompt_tokens + 12
        texts = [choice.message.content if chat else choice.text for choice in found.choices]
        scores = [choice.logprobs for choice in found.choices]
    else:
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
        assert lines[-1] == "[DONE]"
        events = [form.model_validate(json.loads(line)) for line in lines[:-1]]
        assert events[-1].usage.completion_tokens == 12
        assert all(json.loads(line)["usage"] is None for line in lines[:-2])
        pieces = [choice for event in events for choice in event.choices]
        texts = ["".join((p.delta.content or "") if chat else p.text for p in pieces if p.index == i) for i in range(2)]
        scores = [p.logprobs for p in pieces if p.logprobs is not None]
    assert any(scores) is scored
    if scored and not chat:
        for number in range(2):
            mine = [p.logprobs for p in pieces if p.index == number and p.logprobs] if stream else [scores[number]]
            tokens = [token for one in mine for token in one.tokens]
            offsets = [offset for one in mine for offset in one.text_offset]
            assert len(tokens) == 6
            assert offsets == sorted(offsets)
            assert 0 == offsets[0] <= offsets[-1] <= len(texts[number])


def test_a_stream_that_fails_has_the_forms_that_the_document_names(server: Live) -> None:
    asked = {"model": "raising", "scene": "raise later", "stream": True, "max_tokens": 6}
    with server.http() as http:
        answer = http.post("/v1/completions", json={**asked, "prompt": "rain"})
    schema = server.app.openapi()["paths"]["/v1/completions"]["post"]["responses"]["200"]["content"]
    names = [one["$ref"].rpartition("/")[2] for one in schema["text/event-stream"]["schema"]["anyOf"]]
    assert names == ["Completion", "ErrorBody"]
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    ErrorBody.model_validate(json.loads(lines[-2]))
    for line in lines[:-2]:
        responses.Completion.model_validate(json.loads(line))


def test_the_place_of_a_token_is_that_of_its_text_in_the_answer() -> None:
    """Characters of several tokens, and a tokenizer whose words lose their space when decoded alone."""

    class Words:
        def decode(self, ids: list[int], **_: Any) -> str:
            return " ".join(f"w{number}" for number in ids)

    class Bytes:
        def decode(self, ids: list[int], **_: Any) -> str:
            return bytes(ids).decode(errors="replace")

    for tokenizer, ids, places in (
        (Words(), [1, 2, 3], [0, 2, 5]),
        (Bytes(), list("é€ab".encode()), [0, 0, 1, 1, 1, 2, 3]),
        (Bytes(), [*"é".encode(), 0xDE, *b"7a"], [0, 0, 1, 2, 3]),  # a byte that is no character
    ):
        prepared = SimpleNamespace(model="base", tickets=[], prompt_tokens=1, cached_tokens=0)
        scores = [TokenScore(token, -1.0, ()) for token in ids]
        whole = Response("text", "x", prepared, "f", tokenizer, 0).whole([Choice(scores=scores, reason="stop")])
        assert whole["choices"][0]["logprobs"]["text_offset"] == places
        streamed = Response("text", "x", prepared, "f", tokenizer, 0)
        pieces = [streamed.piece(0, "", [one])["choices"][0]["logprobs"]["text_offset"] for one in scores]
        assert [place for piece in pieces for place in piece] == places


@pytest.mark.parametrize(("path", "form"), [("/v1/models", "Models"), ("/health", "Health"), ("/ready", "Ready")])
def test_what_the_server_tells_of_itself_has_its_form(server: Live, path: str, form: str) -> None:
    told = server.app.openapi()["paths"][path]["get"]["responses"]["200"]["content"]["application/json"]["schema"]
    assert told["$ref"].rpartition("/")[2] == form
    with server.http() as http:
        getattr(responses, form).model_validate(http.get(path).json())


def test_each_name_in_the_list_states_its_own_base(server: Live) -> None:
    with server.http() as http:
        bases = {model["id"]: model["lora_rt"]["base"] for model in http.get("/v1/models").json()["data"]}
    own = server.service.runtime.base.id
    assert (bases["base"], bases["one"]) == (own, own)
    assert bases["emotion"] == "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.parametrize(
    ("path", "field", "said"),
    [
        ("/v1/chat/completions", {"max_tokens": True}, "max_tokens"),
        ("/v1/completions", {"seed": False}, "seed"),
        ("/v1/completions", {"logprobs": True}, "how many likely tokens"),
        ("/v1/completions", {"composition": {"one": True}}, "number"),
        ("/v1/completions", {"composition": {"one": "0.5"}}, "understood: composition.one: it is not a number. See"),
        ("/v1/completions", {"composition": 5}, "understood: composition: it is neither an object nor a text. See"),
        ("/v1/completions", {"prompt": [True]}, "prompt.0: it is not a"),
        ("/v1/completions", {"prompt": [[3], [True]]}, "understood: prompt.1.0: it is not a whole number. See"),
        ("/v1/completions", {"stop": ["a", 5]}, "understood: stop.1: it is not a text. See"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": 5}]},
            "content: it is neither a text nor a list.",
        ),
        ("/v1/chat/completions", {"min_tokens": 50, "max_tokens": 5}, "min_tokens is 50, and the answer has at most 5"),
        ("/v1/completions", {"min_tokens": 50}, "at most 16"),
        ("/v1/chat/completions", {"top_logprobs": 2}, "top_logprobs go with logprobs: true"),
        ("/v1/completions", {"stream_options": {"include_usage": True}}, "stream_options go with stream: true"),
    ],
)
def test_what_is_no_number_or_contradicts_itself_is_refused(server: Live, path: str, field: Any, said: str) -> None:
    given = {"prompt": "rain"} if path == "/v1/completions" else {"messages": [{"role": "user", "content": "rain"}]}
    with server.http() as http:
        answer = http.post(path, json={"model": "base", **given, **field})
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('{"model": "base", ', "it is not JSON: Expecting property name enclosed in double quotes, at character"),
        ("", "there is no body"),
    ],
)
def test_a_body_that_is_not_json_is_told_where(server: Live, body: str, said: str) -> None:
    with server.http() as http:
        answer = http.post("/v1/completions", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert said in answer.json()["error"]["message"]


def test_no_log_p_is_told_of_completions_that_say_false(server: Live) -> None:
    with server.http() as http:
        answer = http.post(
            "/v1/completions", json={"model": "base", "prompt": "rain", "logprobs": False, "max_tokens": 2}
        )
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["logprobs"] is None


def test_parts_of_characters_are_told_apart_in_completions() -> None:
    class Bytes:
        def decode(self, ids: list[int], **_: Any) -> str:
            return bytes(ids).decode(errors="replace")

        def convert_ids_to_tokens(self, token: int) -> str:
            return f"<0x{token:02X}>"

    prepared = SimpleNamespace(model="base", tickets=[], prompt_tokens=1, cached_tokens=0)
    score = TokenScore(0xE3, -1.0, ((0xE3, -1.0), (0xE4, -2.0), (ord("a"), -3.0)))
    told = Response("text", "x", prepared, "f", Bytes(), 3).whole([Choice(scores=[score], reason="stop")])
    logprobs = told["choices"][0]["logprobs"]
    assert logprobs["tokens"] == ["bytes:\\xe3"]
    assert logprobs["top_logprobs"] == [{"bytes:\\xe3": -1.0, "bytes:\\xe4": -2.0, "a": -3.0}]
