"""The command: what it says, what its own example does, and how it ends."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from fastapi import FastAPI

from lora_rt.core.runtime import Runtime
from lora_rt.core.serving.server import configured, listen, serve
from lora_rt.core.serving.settings import ServeSettings
from support.cli import Cli, command_line
from support.serving import asked
from support.tiny import Zoo

pytestmark = pytest.mark.slow


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return command_line(monkeypatch, capsys)


@pytest.fixture
def process(zoo: Zoo, project: Path, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[subprocess.Popen[str]]:
    """`lora-rt serve` of a tiny base, in a process of its own; the fixture's parameter is further options."""
    base = zoo.base("llama", max_position_embeddings=2048)
    command = [sys.executable, "-m", "lora_rt", "serve", "--base", str(base), "--precision", "float32", "--port", "0"]
    environment = {**os.environ, "COLUMNS": "200", "OMP_NUM_THREADS": "1", "LORA_RT_HOME": str(tmp_path / "home")}
    started = subprocess.Popen(
        [*command, "--max-new-tokens", "1500", *getattr(request, "param", ())],
        cwd=project,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
    )
    yield started
    started.kill()
    started.wait()
    assert started.stderr is not None
    started.stderr.close()


def test_whoever_comes_as_soon_as_the_address_is_said_is_not_refused(runtime: Runtime) -> None:
    class SaidError(Exception):
        pass

    def announce(url: str) -> None:
        socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), 5).close()
        raise SaidError

    settings = ServeSettings(port=0)
    with listen(settings) as bound, pytest.raises(SaidError):
        serve(runtime, settings, bound, announce=announce)


def banner(process: subprocess.Popen[str]) -> tuple[str, str]:
    """The address, and the command of the example."""
    assert process.stderr is not None
    text = ""
    while "-d '" not in text:
        line = process.stderr.readline()
        assert line, text
        text += line
    threading.Thread(target=process.stderr.read, daemon=True).start()
    url = re.search(r"http://127\.0\.0\.1:\d+", text)
    assert url is not None
    return url[0], text[text.index("curl") :].replace("\\\n", " ")


def test_the_example_of_the_banner_works_and_a_signal_lets_answers_end(process: subprocess.Popen[str]) -> None:
    url, example = banner(process)
    words = shlex.split(example)
    assert words[0] == "curl"
    with httpx2.Client(base_url=url, timeout=60) as http:
        # The registers that ship with the package are for another base: the answer says so.
        refused = http.post(
            words[1], content=words[words.index("-d") + 1], headers={"Content-Type": "application/json"}
        )
        assert refused.status_code == 400
        assert "emotion" in refused.json()["error"]["message"]
        body = asked(model="one:0.5", max_tokens=400, stream=True)
        with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            lines = answer.iter_lines()
            for _ in range(4):
                next(lines)
            process.send_signal(signal.SIGTERM)
            while http.get("/ready").status_code != 503:
                pass
            assert http.post("/v1/chat/completions", json=asked()).status_code == 503
            pieces = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert pieces[-1]["choices"][0]["finish_reason"] == "length"
    assert process.wait() == 0


@pytest.mark.parametrize("process", [("--drain", "0.05")], indirect=True)
def test_whoever_is_not_done_when_draining_ends_is_told_so(process: subprocess.Popen[str]) -> None:
    url, _ = banner(process)
    body = asked(model="one:0.5", max_tokens=1400, min_tokens=1400, stream=True)
    with httpx2.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGTERM)
        *_, error, end = (line for line in lines if line)
    assert json.loads(error[6:])["error"]["code"] == "draining"
    assert end == "data: [DONE]"
    assert process.wait() == 0


def test_a_port_that_somebody_has_is_told_before_a_base_is_loaded(cli: Cli) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        outcome = cli("serve", "--port", str(taken.getsockname()[1]), "--base", "/nowhere")
    assert outcome.code == 1
    assert "can't listen" in outcome.err


def test_an_address_that_others_can_reach_is_warned_of(cli: Cli) -> None:
    outcome = cli("serve", "--host", "0.0.0.0", "--port", "0", "--base", "/nowhere")
    assert "without --api-key everybody" in outcome.err
    assert "everybody" not in cli("serve", "--port", "0", "--base", "/nowhere").err


def test_another_engine_is_a_wrong_option(cli: Cli) -> None:
    assert cli("serve", "--engine", "magic").code == 2


def test_a_server_is_measured_beside_generate(
    cli: Cli, zoo: Zoo, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    base = str(zoo.base("llama", max_position_embeddings=512))
    small = ("--requests", "4", "--tokens", "3", "--rows", "2", "--adapters", "one,two", "--overload", "0.2")
    outcome = cli("bench", "serve", "--base", base, "--precision", "float32", *small, "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["at_once"]["served"] == 4
    assert found["at_once"]["failed"] == 0
    assert found["overload"]["failed"] == 0
    assert found["ratio_to_generate"] > 0
    assert found["at_90%"]["first_ms"]["p99"] > 0


def test_an_idle_connection_is_kept_for_longer_than_clients_keep_theirs() -> None:
    """Else a request can meet the server's good-bye, and its client can't know whether it was heard."""
    assert configured(FastAPI(), 1).timeout_keep_alive > 10 * httpx2.Limits().keepalive_expiry
