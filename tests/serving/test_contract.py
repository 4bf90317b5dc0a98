"""The OpenAPI document is true, and no request that it describes, or nearly describes, makes the server fail."""

from __future__ import annotations

import json
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.generation.modes import GenerationMode

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
