"""A Hub that lies gets nothing past: not a path, not a byte, not a token, and it is noticed in time."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_rt.errors import LoraRtError
from lora_rt.registry.errors import ChangedAdapterError, HubError, RejectedAdapterError
from lora_rt.registry.hub.pull import install, pull
from lora_rt.registry.reference import Reference
from lora_rt.registry.store import Store
from support.adapters import adapter_files
from support.hub import Handler, LocalHub, git_oid, sha256

pytestmark = pytest.mark.slow

REPO = Reference.parse("someone/emotion")
WEIGHTS = "adapter_model.safetensors"
Twist = Callable[[Handler], bool]


def _headers(**headers: str) -> Twist:
    """Answer every question about a file with these headers."""

    def twist(handler: Handler) -> bool:
        if "/resolve/" not in handler.path:
            return False
        facts = {"X-Repo-Commit": "0" * 40, "ETag": '"' + "0" * 40 + '"', **headers}
        handler.send(200, b"x" * 10, {key.replace("_", "-"): value for key, value in facts.items()})
        return True

    return twist


def _answer(part: str, body: object, status: int = 200, **headers: str) -> Twist:
    """Answer requests whose path holds `part` with this body."""

    def twist(handler: Handler) -> bool:
        if part in handler.path:
            handler.send(status, body, headers)
        return part in handler.path

    return twist


def _content(body: bytes) -> Twist:
    """Tell the truth about the weights, and send something else."""

    def twist(handler: Handler) -> bool:
        if handler.command != "GET" or not handler.path.endswith(WEIGHTS):
            return False
        handler.send(200, body)
        return True

    return twist


def _endless(part: str) -> Twist:
    """A body that goes on until the other side hangs up."""

    def twist(handler: Handler) -> bool:
        if handler.command != "GET" or part not in handler.path:
            return False
        handler.send_response(200)
        handler.send_header("Connection", "close")
        handler.end_headers()
        try:
            for _ in range(100_000):
                handler.wfile.write(b" " * 65536)
        except OSError:
            pass
        handler.close_connection = True
        return True

    return twist


def _endless_pages(handler: Handler) -> bool:
    if "/tree/" not in handler.path:
        return False
    handler.send(200, [], {"Link": f'<{handler.hub.endpoint}{handler.path.split("?")[0]}?page=x>; rel="next"'})
    return True


def _tree(**facts: object) -> Twist:
    good = adapter_files()
    entries = [
        {"type": "file", "path": name, "size": len(good[name]), "oid": git_oid(good[name]), **facts} for name in good
    ]
    return _answer("/tree/", entries)


GOOD = adapter_files()[WEIGHTS]
LIES: dict[str, Twist] = {
    "a commit that is a path": _headers(X_Repo_Commit="../../../../../../tmp/lora-rt-evil"),
    "a commit that is a branch": _headers(X_Repo_Commit="main"),
    "an ETag that is a path": _headers(ETag='"../../../../../../../tmp/lora-rt-evil"'),
    "a linked ETag that is a path": _headers(X_Linked_ETag='"/tmp/lora-rt-evil"'),
    "an ETag that is no hash": _headers(ETag='"latest"'),
    "a commit of 39 digits": _answer("/revision/", {"id": REPO.target, "sha": "a" * 39, "siblings": []}),
    "a commit that is a path, in the list": _answer("/revision/", {"id": "a/b", "sha": "../../x", "siblings": []}),
    "a commit that is a number": _answer("/revision/", {"id": "a/b", "sha": 7, "siblings": []}),
    "no commit": _answer("/revision/", {"id": "a/b", "siblings": []}),
    "a page instead of JSON": _answer("/revision/", b"<html>"),
    "a list instead of an object": _answer("/revision/", []),
    "a tree that is no JSON": _answer("/tree/", b"{"),
    "a tree that is an object": _answer("/tree/", {"type": "file"}),
    "a tree of texts": _answer("/tree/", ["a", "b"]),
    "a tree without sizes": _answer("/tree/", [{"type": "file", "path": WEIGHTS}]),
    "a tree of other kinds": _answer("/tree/", [{"type": "symlink", "path": WEIGHTS}]),
    "an empty tree": _answer("/tree/", []),
    "a tree of paths that lead elsewhere": _answer(
        "/tree/", [{"type": "file", "path": path, "size": 1, "oid": "0" * 40} for path in ("../../x", "/x", "..\\x")]
    ),
    "sizes of 1 TB": _tree(size=1 << 40),
    "sizes that are negative": _tree(size=-1),
    "sizes that are text": _tree(size="1"),
    "hashes that are wrong": _tree(oid="0" * 40),
    "hashes that are no hashes": _tree(oid="../../x"),
    "another file's content": _content(adapter_files(seed=5)[WEIGHTS]),
    "a content with one wrong byte": _content(GOOD[:-1] + bytes([GOOD[-1] ^ 1])),
    "a content cut off": _content(GOOD[:-10]),
    "a content with bytes too many": _content(GOOD + b"more"),
    "an endless content": _endless(WEIGHTS),
    "an endless list": _endless("/revision/"),
    "an endless tree": _endless("/tree/"),
    "endless pages": _endless_pages,
    "a redirect to itself": lambda handler: _redirect(handler, handler.path),
    "a redirect to a file": lambda handler: _redirect(handler, "file:///etc/passwd"),
    "a redirect to a closed port": lambda handler: _redirect(handler, "http://127.0.0.1:9/x"),
}


def _redirect(handler: Handler, target: str) -> bool:
    if not handler.path.endswith(WEIGHTS):
        return False
    facts = {"Location": target, "X-Repo-Commit": "0" * 40, "ETag": f'"{"0" * 40}"', "X-Linked-Size": str(len(GOOD))}
    handler.send(302, b"", facts)
    return True


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client waits a second between its five tries; not here."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)


@pytest.mark.usefixtures("quick_retries")
@pytest.mark.parametrize("lie", LIES)
def test_a_lie_installs_nothing_and_writes_nothing_elsewhere(
    lie: str, hub: LocalHub, store: Store, tmp_path: Path
) -> None:
    hub.commit(REPO.target, adapter_files())
    hub.twist = LIES[lie]
    outside = _outside(tmp_path)
    with pytest.raises((HubError, ChangedAdapterError, RejectedAdapterError)) as error:
        pull(store, REPO)
    assert isinstance(error.value, LoraRtError)
    assert "\n" not in error.value.message
    assert len(error.value.message) < 400
    assert store.installed() == []
    assert store.orphans() == []
    assert _outside(tmp_path) == outside
    hub.twist = None
    assert pull(store, REPO).name == "emotion"


def _outside(tmp_path: Path) -> set[str]:
    """Everything near the cache and the home that should not grow: names beside them, and in /tmp those of the lies."""
    cache = Path(os.environ["HF_HOME"])
    return {
        *(str(path) for path in tmp_path.rglob("*") if "home" not in path.parts),
        *(str(path) for path in cache.parent.iterdir() if path != cache),
        *(str(path) for path in Path("/tmp").glob("lora-rt-evil*")),
    }


def test_a_redirect_elsewhere_gets_no_token_and_no_trust(
    hub: LocalHub, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.commit(REPO.target, adapter_files(), token="hf_secret")
    seen: list[str | None] = []

    def receive(handler: Handler) -> bool:
        seen.append(handler.headers.get("Authorization"))
        handler.send(200, adapter_files(seed=5)[WEIGHTS])
        return True

    with LocalHub() as elsewhere:
        elsewhere.twist = receive

        def send(handler: Handler) -> bool:
            if not handler.path.endswith(WEIGHTS) or handler.command != "HEAD":
                return False
            facts = {
                "Location": f"{elsewhere.endpoint}/x".replace("127.0.0.1", "localhost"),
                "ETag": f'"{sha256(GOOD)}"',
            }
            commit = hub.repos[REPO.target].refs["main"]
            handler.send(302, b"", {**facts, "X-Repo-Commit": commit, "X-Linked-Size": str(len(GOOD))})
            return True

        hub.twist = send
        with pytest.raises(ChangedAdapterError, match="another content"):
            pull(store, REPO)
    assert seen
    assert set(seen) == {None}


def test_a_changed_file_behind_a_locked_commit_is_found(hub: LocalHub, store: Store) -> None:
    commit = hub.commit(REPO.target, adapter_files())
    pins = {name: sha256(content) for name, content in adapter_files().items()}
    hub.repos[REPO.target].commits[commit] = adapter_files(seed=9)
    with pytest.raises(ChangedAdapterError, match="not what was locked") as error:
        install(store, REPO.target, commit, "emotion", expected=pins)
    assert any(WEIGHTS in problem for problem in error.value.problems)
    assert store.installed() == []


@pytest.mark.usefixtures("quick_retries")
def test_a_hub_that_fails_is_explained(hub: LocalHub, store: Store) -> None:
    hub.commit(REPO.target, adapter_files())
    hub.twist = _answer("/", json.dumps({"error": "boom"}).encode(), 500)
    with pytest.raises(HubError, match="someone/emotion"):
        pull(store, REPO)


@pytest.mark.parametrize(
    ("status", "says"), [(403, r"does not let you do that .*\(403\)"), (418, "the Hub failed on someone/emotion")]
)
def test_a_refusal_of_a_files_facts_is_no_lack_of_a_network(
    hub: LocalHub, store: Store, status: int, says: str
) -> None:
    hub.commit(REPO.target, adapter_files())
    hub.twist = _answer("/resolve/", {"error": "no"}, status)
    with pytest.raises(HubError, match=says) as error:
        pull(store, REPO)
    assert "HF_HUB_OFFLINE" not in error.value.next_step


@pytest.mark.parametrize("token", ["тест", "hf_\x0csecret"])
def test_a_token_that_can_not_be_sent_is_named_and_not_shown(
    hub: LocalHub, store: Store, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    hub.commit(REPO.target, adapter_files())
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError, match="the Hub token holds a character that none can have") as error:
        pull(store, REPO)
    assert "HF_TOKEN" in error.value.next_step
    assert "secret" not in str(error.value)
