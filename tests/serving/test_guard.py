"""Who may ask, how much, and what is told before a body is read."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from lora_rt.core.runtime import Runtime
from lora_rt.core.serving.settings import Limits, ServeSettings
from support.serving import Live, asked, live

CHAT = "/v1/chat/completions"


def error_of(answer: httpx2.Response) -> dict[str, Any]:
    """The error object, whole."""
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.slow
def test_without_the_key_nothing_is_told(runtime: Runtime) -> None:
    with live(runtime, ServeSettings(port=0, api_key="secret")) as server:
        for key in ("", "wrong", "secret2"):
            with server.http(key) as http:
                for path in ("/v1/models", "/v1/models/one", "/metrics"):
                    assert http.get(path).status_code == 401
                refused = http.post(CHAT, json=asked())
                assert refused.status_code == 401
                assert error_of(refused)["type"] == "authentication_error"
                assert http.get("/health").status_code == 200
        with server.http("secret") as http:
            assert http.post(CHAT, json=asked()).status_code == 200
            assert http.get("/metrics").status_code == 200


def test_admin_is_not_there_without_a_key_of_its_own(runtime: Runtime) -> None:
    with live(runtime, ServeSettings(port=0, api_key="secret")) as server, server.http("secret") as http:
        assert http.get("/admin/adapters").status_code == 404


def test_a_page_of_the_web_can_not_ask_a_server_of_this_machine(server: Live) -> None:
    with server.http() as http:
        assert http.get("/v1/models", headers={"Host": "evil.example"}).status_code == 403
        assert http.get("/v1/models", headers={"Host": "localhost:1234"}).status_code == 200
        plain = http.post(CHAT, content=json.dumps(asked()), headers={"Content-Type": "text/plain"})
        assert plain.status_code == 400


def test_headers_without_end_are_not_kept(server: Live) -> None:
    """They come before any key is looked at."""
    address = httpx2.URL(server.url)
    with socket.create_connection((address.host, address.port), timeout=30) as client:
        client.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        with pytest.raises(OSError):  # it says 400, and closes the connection
            _send_headers(client, 100)
    with server.http() as http:
        assert http.get("/health").status_code == 200


def _send_headers(client: socket.socket, many: int) -> None:
    for number in range(many):
        client.sendall(f"X-{number}: ".encode() + b"a" * 10_000 + b"\r\n")
        time.sleep(0.01)


def test_what_is_too_large_is_refused(runtime: Runtime) -> None:
    limits = Limits(body=4000, messages=3)
    with live(runtime, ServeSettings(port=0, limits=limits)) as server, server.http() as http:
        assert http.post(CHAT, json=asked("a" * 4000)).status_code == 413

        def endless() -> Any:
            for _ in range(100):
                yield b" " * 1000

        assert http.post(CHAT, content=endless(), headers={"Content-Type": "application/json"}).status_code == 413
        many = http.post(CHAT, json=asked() | {"messages": [{"role": "user", "content": "a"}] * 4})
        assert many.status_code == 413
        assert error_of(many)["code"] == "too_many_messages"
        assert http.post(CHAT, json=asked()).status_code == 200


@pytest.mark.slow
def test_a_full_queue_is_told_with_when_to_come_again_whatever_the_body_is(runtime: Runtime) -> None:
    limits = Limits(rows=1, queue=1)

    async def ask_all(server: Live) -> list[httpx2.Response]:
        async with httpx2.AsyncClient(base_url=server.url, timeout=60) as http:
            first = asyncio.gather(*(http.post(CHAT, json=asked(max_tokens=200)) for _ in range(2)))
            while server.service.busy < 2:
                await asyncio.sleep(0.002)
            refused = [await http.post(CHAT, content=body) for body in (b"{", json.dumps(asked()).encode())]
            return [*refused, *(await first)]

    with live(runtime, ServeSettings(port=0, limits=limits)) as server:
        *refused, one, other = asyncio.run(ask_all(server))
        assert [answer.status_code for answer in (one, other)] == [200, 200]
        for answer in refused:
            assert answer.status_code == 429
            assert int(answer.headers["Retry-After"]) >= 1
            assert error_of(answer)["code"] == "queue_full"
        assert server.idle()


@pytest.mark.slow
def test_while_it_is_being_stopped_a_server_ends_what_it_began_and_takes_nothing_new(runtime: Runtime) -> None:
    with live(runtime, ServeSettings(port=0)) as server, server.openai() as client, server.http() as http:
        with client.chat.completions.create(**asked(max_tokens=60), stream=True) as stream:
            pieces = iter(stream)
            next(pieces)
            server.service.draining = True
            refused = http.post(CHAT, json=asked())
            assert refused.status_code == 503
            assert error_of(refused)["code"] == "draining"
            assert http.get("/ready").status_code == 503
            assert http.get("/health").status_code == 200
            last = list(pieces)[-1]
        assert last.choices[0].finish_reason == "length"


def test_a_client_that_goes_away_leaves_nothing_behind(server: Live) -> None:
    for body in (asked(max_tokens=400, stream=True), asked(max_tokens=400)):
        # As a process that is killed: the connection is cut in the middle of an answer.
        host, port = server.url.removeprefix("http://").split(":")
        content = json.dumps(body).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
            while not server.service.scheduler.running:
                time.sleep(0.002)
        assert server.idle()
        assert server.service._flying == {}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", CHAT, 405), ("DELETE", "/v1/models", 405), ("GET", "/v1/models/../x", 404)],
)
def test_errors_of_every_kind_have_openais_form(server: Live, method: str, path: str, status: int) -> None:
    with server.http() as http:
        answer = http.request(method, path)
    assert answer.status_code == status
    assert error_of(answer)["message"]


@pytest.mark.slow
def test_a_stream_that_fails_is_counted_as_a_failure(runtime: Runtime, caplog: pytest.LogCaptureFixture) -> None:
    broken = asked(model="raising", scene="raise later", stream=True)
    with (
        caplog.at_level(logging.INFO, "lora_rt.serving"),
        live(runtime, ServeSettings(port=0)) as server,
        server.http() as http,
    ):
        assert http.post(CHAT, json=broken).status_code == 200  # which is said before it fails
        wanted = f'lora_rt_requests_total{{endpoint="{CHAT}",status="500"}} 1.0'
        until = time.monotonic() + 10  # it is counted behind the last byte
        while wanted not in http.get("/metrics").text:
            assert time.monotonic() < until
            time.sleep(0.02)
    lines = [json.loads(r.message) for r in caplog.records if r.name == "lora_rt.serving.requests"]
    assert [(line["status"], line["failed"]) for line in lines] == [(200, 500)]


def test_the_metrics_tell_what_was_asked(runtime: Runtime) -> None:
    with live(runtime, ServeSettings(port=0)) as server, server.http() as http:
        for _ in range(2):
            assert http.post(CHAT, json=asked("rain " * 40, model="one two:0.5", max_tokens=7)).status_code == 200
        http.post(CHAT, json=asked(model="nobody"))
        http.get("/a/path/that/is/nowhere")
        families = list(text_string_to_metric_families(http.get("/metrics").text))
    values = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families
        for sample in family.samples
    }
    assert values["lora_rt_requests_total", (("endpoint", CHAT), ("status", "200"))] == 2
    assert values["lora_rt_requests_total", (("endpoint", CHAT), ("status", "404"))] == 1
    assert values["lora_rt_requests_total", (("endpoint", "other"), ("status", "404"))] == 1
    assert values["lora_rt_adapter_requests_total", (("adapter", "one"),)] == 2
    assert values["lora_rt_adapter_requests_total", (("adapter", "two"),)] == 2
    assert values["lora_rt_tokens_total", (("kind", "answer"),)] == 14
    assert values["lora_rt_time_to_first_token_seconds_count", ()] == 2
    assert values["lora_rt_time_between_tokens_seconds_count", ()] == 12
    assert values["lora_rt_prefix_lookups_total", (("result", "hit"),)] == 1
    assert values["lora_rt_rows_running", ()] == 0
    assert values["lora_rt_adapter_bytes", ()] > 0


@pytest.mark.parametrize("log_prompts", [False, True])
def test_the_log_holds_prompts_only_where_the_operator_wants_them(
    runtime: Runtime, caplog: pytest.LogCaptureFixture, log_prompts: bool
) -> None:
    settings = ServeSettings(port=0, log_prompts=log_prompts)
    with caplog.at_level(logging.INFO, "lora_rt.serving"), live(runtime, settings) as server, server.http() as http:
        answer = http.post(CHAT, json=asked("a word nobody is to read", model="one:0.5", max_tokens=5))
    lines = [json.loads(r.message) for r in caplog.records if r.name == "lora_rt.serving.requests"]
    assert len(lines) == 1
    told = lines[0]
    assert told["id"] == answer.json()["id"]
    assert (told["status"], told["model"], told["answer_tokens"], told["finish"]) == (200, "one:0.5", 5, ["length"])
    assert ("nobody is to read" in json.dumps(told)) == log_prompts


@pytest.mark.parametrize("host", ["LOCALHOST:1", "localhost.", "127.0.0.2", "[::1]:80", "[::ffff:127.0.0.1]"])
def test_every_name_of_this_machine_is_one(server: Live, host: str) -> None:
    with server.http() as http:
        assert http.get("/v1/models", headers={"Host": host}).status_code == 200


def test_a_key_with_blanks_around_it_is_the_key(runtime: Runtime) -> None:
    with live(runtime, ServeSettings(port=0, api_key=" secret\n")) as server, server.http("secret") as http:
        assert http.get("/v1/models").status_code == 200


def test_what_can_never_be_served_is_no_full_queue_and_refusals_are_counted_by_their_path(runtime: Runtime) -> None:
    settings = ServeSettings(port=0, limits=Limits(rows=2, queue=1))
    with live(runtime, settings) as server, server.http() as http:
        answer = http.post("/v1/chat/completions", json=asked(n=4))
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "too_many_answers")
        server.service.draining = True
        assert http.post("/v1/chat/completions", json=asked()).status_code == 503
        assert 'endpoint="/v1/chat/completions",status="503"} 1.0' in http.get("/metrics").text


def test_whoever_is_not_done_when_the_server_stops_is_told_so_and_when_to_come_again(runtime: Runtime) -> None:
    with live(runtime, ServeSettings(port=0)) as server, server.http() as http:
        with ThreadPoolExecutor(1) as pool:
            whole = pool.submit(http.post, "/v1/chat/completions", json=asked(max_tokens=400, min_tokens=400))
            while not server.service.scheduler.running:
                time.sleep(0.002)
            server.service.scheduler.stop()
            answer = whole.result()
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
        assert answer.headers["retry-after"]


def test_a_failure_that_would_come_again_is_not_to_be_tried_again(runtime: Runtime) -> None:
    settings = ServeSettings(port=0, limits=Limits(deadline=0.01))
    with live(runtime, settings) as server, server.http() as http:
        answer = http.post("/v1/chat/completions", json=asked(max_tokens=400, min_tokens=400))
        assert (answer.status_code, answer.headers["x-should-retry"]) == (500, "false")
