"""A Hub that accepts and never answers, that drips or that breaks off holds nothing up: one line, and what to do."""

from __future__ import annotations

import logging
import re
import select
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from lora_rt.registry.errors import HubError
from lora_rt.registry.hub import limits
from lora_rt.registry.hub.pull import pull
from lora_rt.registry.hub.search import search
from lora_rt.registry.reference import Reference
from lora_rt.registry.registry import Registry
from lora_rt.registry.store import Store
from lora_rt.registry.sync import make_lock
from lora_rt.registry.verify import verify
from support.adapters import adapter_files
from support.cli import Cli
from support.hub import Handler, LocalHub, drips, never_answers, resets

pytestmark = pytest.mark.slow

REPO = "someone/emotion"
Twist = Callable[[Handler], bool]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same limits, fifty times shorter; the client's pauses between its tries are left out."""
    short = limits.Limits(connect=0.3, read=0.3, answer=0.3, window=0.4, floor=512, tries=3)
    monkeypatch.setattr(limits, "LIMITS", short)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@contextmanager
def patience() -> Iterator[None]:
    """The usual limits, where the Hub behaves well: a pause of a busy machine is none of its."""
    short, limits.LIMITS = limits.LIMITS, limits.Limits()
    yield
    limits.LIMITS = short


def _at(part: str, behaviour: Twist) -> Twist:
    """Behave so at requests whose path holds `part`, and well at others."""
    return lambda handler: part in handler.path and behaviour(handler)


SLOW = drips(b"[" + b" " * 4000 + b"]", 0.02)
BEHAVIOURS = {
    "never answers": never_answers,
    "drips": SLOW,
    "drips its headers": drips(b"[]", 0.02, headers=True),
    "resets": resets,
}
PLACES = {"the commit": "/revision/", "the list": "/tree/", "a file's facts": "/resolve/", "a file": "safetensors"}


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
@pytest.mark.parametrize("place", PLACES)
def test_a_pull_is_given_up_in_one_line(hub: LocalHub, store: Store, behaviour: str, place: str) -> None:
    hub.commit(REPO, adapter_files())
    twist = _at(PLACES[place], BEHAVIOURS[behaviour])
    hub.twist = twist if place != "a file" else lambda handler: handler.command == "GET" and twist(handler)
    with pytest.raises(HubError) as error:
        pull(store, Reference.parse(REPO))
    assert "\n" not in error.value.message
    assert error.value.next_step
    assert len(hub.requests) < 15
    assert store.installed() == []
    hub.twist = None
    with patience():
        assert pull(store, Reference.parse(REPO)).name == "emotion"


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_search_verify_lock_and_use_are_not_held_up(hub: LocalHub, registry: Registry, behaviour: str) -> None:
    hub.commit(REPO, adapter_files(), tag="v1")
    with patience():
        for name in ("emotion", "second"):
            pull(registry.store, Reference.parse(f"{REPO}@v1"), name=name)
    (registry.folder / "lora-rt.toml").write_text('[adapters]\nmood = "a/b"\n')
    hub.twist = BEHAVIOURS[behaviour]
    for action in (lambda: search("x"), lambda: registry.resolve("c/d"), lambda: make_lock(registry)):
        with pytest.raises(HubError):
            action()
    hub.requests.clear()
    first, second = (item for item in verify(registry, ["emotion", "second"]) if item.source == f"hub {REPO}")
    assert first.notes[0].startswith("not compared with the Hub: ")
    assert second.notes == ()
    assert len(hub.requests) == 1


@pytest.mark.parametrize("part", ["/repos/create", "/preupload/", "/lfs/", "/commit/"])
@pytest.mark.parametrize("behaviour", ["never answers", "drips", "resets"])
def test_a_push_is_given_up_in_one_line(
    hub: LocalHub, store: Store, monkeypatch: pytest.MonkeyPatch, cli: Cli, behaviour: str, part: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    hub.commit(REPO, adapter_files())
    with patience():
        pull(store, Reference.parse(REPO))
    hub.twist = _at(part, BEHAVIOURS[behaviour])
    done = cli("push", "emotion", "me/mood")
    assert done.code == 1
    assert done.out == ""
    assert len(done.err.splitlines()) == 1


def test_a_slow_hub_that_sends_enough_is_waited_for(
    hub: LocalHub, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "LIMITS", replace(limits.LIMITS, read=5.0, floor=64))
    hub.commit(REPO, adapter_files())
    content = adapter_files()["adapter_model.safetensors"]

    def slow(handler: Handler) -> bool:
        if handler.command != "GET" or not handler.path.endswith("safetensors"):
            return False
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        for place in range(0, len(content), 1 + len(content) // 10):
            handler.wfile.write(content[place : place + 1 + len(content) // 10])
            handler.wfile.flush()
            select.select([], [], [], 0.05)
        return True

    hub.twist = slow
    assert pull(store, Reference.parse(REPO)).name == "emotion"


def test_retries_print_nothing_of_the_clients(hub: LocalHub, store: Store, caplog: pytest.LogCaptureFixture) -> None:
    hub.commit(REPO, adapter_files())
    hub.twist = _at("/tree/", lambda handler: handler.send(503, {"error": "busy"}) or True)
    with caplog.at_level(logging.WARNING), pytest.raises(HubError):
        pull(store, Reference.parse(REPO))
    assert caplog.records == []
    assert sum("/tree/" in line for line in hub.requests) == 3


@pytest.mark.parametrize(
    "headers", [{"Retry-After": "3600"}, {"RateLimit": '"api";r=0;t=3600'}, {"Retry-After": "9" * 5000}]
)
def test_a_hub_that_asks_for_hours_of_patience_is_given_up(
    hub: LocalHub, store: Store, headers: dict[str, str]
) -> None:
    hub.commit(REPO, adapter_files())
    hub.twist = _at("/tree/", lambda handler: handler.send(429, {"error": "slowly"}, headers) or True)
    with pytest.raises(HubError, match=r"asks to wait (3600|9+) s before it is asked again"):
        pull(store, Reference.parse(REPO))
    assert sum("/tree/" in line for line in hub.requests) == 1


def test_nobody_waits_for_a_try_that_is_not_made(hub: LocalHub, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    hub.commit(REPO, adapter_files())
    hub.twist = _at("/tree/", lambda handler: handler.send(429, {}, {"Retry-After": "25"}) or True)
    with patience(), pytest.raises(HubError, match="asks to wait 25 s"):
        pull(store, Reference.parse(REPO))
    assert slept == [26.0, 26.0]


def test_a_short_wait_that_the_hub_asks_for_is_waited_and_told(
    hub: LocalHub, store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    hub.commit(REPO, adapter_files())
    left = [1]

    def once(handler: Handler) -> bool:
        left[0] -= 1
        if left[0] >= 0:
            handler.send(429, {"error": "slowly"}, {"Retry-After": "25"})
        return left[0] >= 0

    hub.twist = _at("/tree/", once)
    with patience(), caplog.at_level(logging.WARNING):
        pull(store, Reference.parse(REPO))
    assert slept == [26.0]
    assert [record.message for record in caplog.records] == [
        "127.0.0.1 asks to wait 25 s before it is asked again (429)"
    ]


def test_one_try_that_fails_is_made_up_for(hub: LocalHub, store: Store) -> None:
    hub.commit(REPO, adapter_files())
    left = [1]

    def once(handler: Handler) -> bool:
        left[0] -= 1
        return left[0] >= 0 and resets(handler)

    hub.twist = _at("/tree/", once)
    with patience():
        assert pull(store, Reference.parse(REPO)).name == "emotion"


def test_a_xet_transfer_that_fails_ends_in_one_line(
    hub: LocalHub, store: Store, monkeypatch: pytest.MonkeyPatch, cli: Cli, tmp_path: Path
) -> None:
    """The transfer itself is Rust's: what it raises is an error without a file or a number."""
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", False)
    hub.commit(REPO, adapter_files())
    with patience():
        pull(store, Reference.parse(REPO))
    done = cli("push", "emotion", "me/mood")
    assert done.code == 1
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize("behaviour", BEHAVIOURS)
def test_a_base_and_its_plan_are_given_up_in_one_line(hub: LocalHub, cli: Cli, behaviour: str) -> None:
    hub.twist = BEHAVIOURS[behaviour]
    for command in (["compose", "emotion", "-p", "x", "--base", "someone/tiny"], ["plan", "someone/tiny"]):
        done = cli(*command)
        assert done.code == 1
        assert len(done.err.splitlines()) == 1
        assert "someone/tiny" in done.err


@pytest.mark.parametrize(
    "command",
    [
        ["search", "x"],
        ["pull", REPO],
        ["compose", REPO, "-p", "x"],
        ["compose", "emotion", "-p", "x", "--base", "someone/tiny", "--allow-base-mismatch"],
        ["plan", "someone/tiny"],
        ["lock"],
        ["push", "emotion", "me/mood"],
    ],
    ids=" ".join,
)
def test_a_hub_that_takes_questions_and_says_nothing_is_asked_once(
    hub: LocalHub, cli: Cli, command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lora-rt.toml").write_text('[adapters]\nmood = "a/b"\n')
    hub.twist = never_answers
    done = cli(*command)
    assert done.code == 1
    assert re.fullmatch(r"error: .*has not answered for 0 s; given up\. .*\n", done.err)
    assert len(hub.requests) == 1
