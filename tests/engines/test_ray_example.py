"""Routing by resident adapters, and the simulation that stands on it; Ray itself is not needed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray-serve"


@pytest.fixture
def routing(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import routing

    yield routing
    del sys.modules["routing"]


@pytest.mark.parametrize(
    ("model", "adapters"),
    [
        ("emotion:0.7 logic:0.3", ("emotion", "logic")),
        ("logic emotion:-1 logic:0.5[So:]", ("emotion", "logic")),
        ("org/repo@v1:0.5", ("org/repo@v1",)),
        ("base", ()),
        ("emotion:warm", ()),
    ],
)
def test_the_adapters_of_a_model_are_those_of_its_composition(routing: Any, model: str, adapters: Any) -> None:
    assert routing.adapters_of(model) == adapters


def test_a_request_goes_where_its_adapters_are(routing: Any) -> None:
    residents = {"a": {"x"}, "b": {"x", "y"}, "c": set()}
    assert routing.choose(("x", "y"), residents, {"a": 3, "b": 3, "c": 3}) == "b"
    assert routing.choose((), residents, {"a": 3, "b": 3, "c": 2}) == "c"
    assert routing.choose(("z",), residents, {"a": 3, "b": 2, "c": 3}) == "b"
    assert routing.choose(("z",), residents, {"a": 3, "b": 3, "c": 3}) == "c", "memories fill evenly"


def test_a_replica_with_too_much_to_do_is_left_out(routing: Any) -> None:
    residents = {"a": {"x"}, "b": set()}
    assert routing.choose(("x",), residents, {"a": 25, "b": 20}) == "a"
    assert routing.choose(("x",), residents, {"a": 40, "b": 20}) == "b"
    assert routing.choose(("x",), residents, {"a": 40, "b": 20}, slack=10) == "a"
    assert routing.choose(("x",), residents, {"a": 15, "b": 0}) == "a", "one batch holds them all"
    assert routing.choose(("x",), residents, {"a": 15, "b": 0}, room=8) == "b"


def test_somebody_always_answers(routing: Any) -> None:
    for busy in range(40):
        assert routing.choose(("x",), {}, {"a": busy}, slack=1.0, room=0) == "a"
        assert routing.choose(("x",), {}, {"a": busy, "b": busy}, slack=1.0, room=0) in ("a", "b")


def test_the_simulation_finds_more_hits_where_it_looks_at_who_has_what() -> None:
    few = {"adapters": 60, "replicas": 6, "rate": 300, "seconds": 4, "kept": 12}
    words = [str(word) for pair in few.items() for word in (f"--{pair[0]}", pair[1])]
    told = subprocess.run([sys.executable, EXAMPLE / "simulate.py", *words, "--json"], capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    hits = {one["policy"]: one["hits"] for one in json.loads(told.stdout)["policies"]}
    assert hits["resident adapters"] > hits["any replica"] + 0.1
