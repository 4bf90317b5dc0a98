"""`lora-rt bench serve`: a real server, and clients that count what they are told."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lora_rt.core.benchmark import servers
from lora_rt.core.benchmark.serving import Served, Wish, fill, summary, wishes
from lora_rt.core.runtime import Runtime
from lora_rt.core.serving.settings import Limits, ServeSettings
from support.cli import Cli, command_line
from support.serving import CHANGES, live
from support.tiny import Zoo

pytestmark = pytest.mark.slow


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    return command_line(monkeypatch, capsys)


def test_a_request_names_every_scale_to_llama_cpp_and_its_composition_to_ours() -> None:
    first, second = wishes(2, 8, ["a", "b", "c"])
    assert set(first.weights) == {"a", "b"}
    assert set(second.weights) == {"a", "c"}
    assert second.body()["model"] == f"a:{second.weights['a']} c:{second.weights['c']}"
    scales = second.body(["a", "b", "c"])["lora"]
    assert scales == [{"id": n, "scale": second.weights.get(name, 0.0)} for n, name in enumerate("abc")]


def test_an_answer_that_is_cut_short_counts_as_failed() -> None:
    whole, short = (Served(status=200, answered=0.1, first=0.2, between=[0.1], tokens=n) for n in (8, 7))
    refused, left, broken = Served(status=429, answered=0.003), Served(status=200, left=True), Served()
    told = summary([whole, whole, short, refused, refused, left, broken], 8)
    assert [told[key] for key in ("served", "refused", "left", "failed")] == [2, 2, 1, 2]
    assert told["refused_ms"] == {"p50": 3.0, "p99": 3.0}


def test_what_fails_beside_a_server_ends_it() -> None:
    command = [sys.executable, "-c", "import time; print('http://127.0.0.1:1', flush=True); time.sleep(600)"]
    with pytest.raises(ConnectionError), servers._started(command) as (_, process):
        raise ConnectionError
    assert not process.is_running()


def test_before_memory_is_watched_as_many_prompts_are_kept_as_may_be(runtime: Runtime) -> None:
    settings = ServeSettings(port=0, limits=Limits(prefix_bytes=200_000))
    with live(runtime, settings) as server, server.http() as plain:
        fill(server.url, Wish("rain", {"one": 0.5}, 3))
        lines = plain.get("/metrics").text.splitlines()
        kept = next(float(line.split()[1]) for line in lines if line.startswith("lora_rt_prefix_bytes "))
        assert 100_000 < kept <= 200_000


@pytest.mark.slow
def test_the_command_measures_a_server_and_leaves_nothing_of_it(
    zoo: Zoo, project: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project)
    sizes = ["--requests", "4", "--tokens", "3", "--rows", "2", "--overload", "0.3", "--soak", "0.3"]
    base = ["--base", str(zoo.base("llama", **CHANGES)), "--precision", "float32", "--adapters", "one,two", "--json"]
    found = json.loads(cli("bench", "serve", *sizes, *base).out)
    for part in ("at_once", "at_50%", "at_90%", "overload", "soak"):
        assert found[part]["failed"] == 0
        assert found[part]["served"] + found[part]["refused"] + found[part]["left"] > 0
    assert found["overload"]["rows_left_behind"] == 0
    assert found["ratio_to_generate"] > 0
