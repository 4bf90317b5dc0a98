"""An adapter goes to the Hub with a card that the Hub renders, and comes back as it was."""

from __future__ import annotations

import pytest
import yaml

from lora_rt.registry.errors import HubError, InvalidReferenceError, RejectedAdapterError, StoreError
from lora_rt.registry.hub.pull import pull
from lora_rt.registry.hub.search import search
from lora_rt.registry.hub.upload import push
from lora_rt.registry.reference import Reference
from lora_rt.registry.registry import Registry
from lora_rt.registry.resolved import Resolved
from support.adapters import adapter_files, write_adapter
from support.hub import Handler, LocalHub

REPO = "tester/emotion"

# The Hub's client sends LFS files in a way that its own HTTP library calls deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=<...>' to upload raw bytes:DeprecationWarning")


@pytest.fixture
def adapter(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Resolved:
    """An adapter in the store, and somebody who is logged in."""
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with registry.store.staging() as staged:
        return registry.store.publish(write_adapter(staged), "emotion", source="trained here", revision=None)


def test_what_was_pushed_is_what_is_pulled(hub: LocalHub, registry: Registry, adapter: Resolved) -> None:
    commit = push(adapter, REPO)
    found = pull(registry.store, Reference.parse(f"{REPO}@{commit}"), name="back")
    readme = {"README.md"}
    assert {k: v for k, v in found.files.items() if k not in readme} == {
        k: v for k, v in adapter.files.items() if k not in readme
    }


def test_what_is_said_of_an_adapter_that_was_trained_here_is_a_sentence(
    hub: LocalHub, registry: Registry, adapter: Resolved
) -> None:
    push(adapter, REPO)
    assert registry.resolve("emotion").why == "'emotion' is installed in the store, trained here"
    with pytest.raises(StoreError, match="the name 'emotion' belongs to an adapter trained here"):
        pull(registry.store, Reference.parse(REPO), name="emotion")


def test_the_card_says_base_register_mode_metrics_and_how_to_use_it(hub: LocalHub, adapter: Resolved) -> None:
    commit = push(adapter, REPO)
    text = hub.repos[REPO].commits[commit]["README.md"].decode()
    front = yaml.safe_load(text.split("---")[1])
    assert front["base_model"] == "tests/tiny-base"
    assert front["library_name"] == "peft"
    assert front["license"] == "apache-2.0"
    assert {"lora-rt", "lora", "register:emotion", "mode:output-only"} <= set(front["tags"])
    metric = front["model-index"][0]["results"][0]["metrics"][0]
    assert (metric["type"], metric["value"]) == ("gain_nats_per_token", 1.19)
    for part in ("lora-rt pull tester/emotion", "| rank | 4 |", "| gain_nats_per_token | 1.19 |", "PeftModel"):
        assert part in text


def test_a_private_push_makes_a_private_repository(hub: LocalHub, adapter: Resolved) -> None:
    push(adapter, REPO, private=True)
    assert hub.repos[REPO].token == "hf_secret"


def test_private_is_refused_where_the_repository_is_public(hub: LocalHub, adapter: Resolved) -> None:
    hub.commit(REPO, {"README.md": b"x"})
    with pytest.raises(HubError, match="is there and public"):
        push(adapter, REPO, private=True)
    assert len(hub.repos[REPO].commits) == 1


def test_a_second_push_is_a_second_commit(hub: LocalHub, adapter: Resolved) -> None:
    push(adapter, REPO)
    push(adapter, REPO)
    assert len(hub.repos[REPO].commits) >= 2


def test_without_a_token_it_says_how_to_log_in(
    hub: LocalHub, adapter: Resolved, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="hf auth login"):
        push(adapter, REPO)


def test_a_wrong_repository_is_refused_before_anything_is_sent(hub: LocalHub, adapter: Resolved) -> None:
    with pytest.raises(InvalidReferenceError, match="org/repo"):
        push(adapter, "emotion")
    assert hub.requests == []


def test_an_adapter_that_nobody_could_load_is_not_pushed(hub: LocalHub, registry: Registry) -> None:
    write_adapter(registry.folder / "bad", adapter_files() | {"adapter_config.json": b"{}"})
    with pytest.raises(RejectedAdapterError):
        push(registry.resolve("./bad"), REPO)
    assert hub.requests == []


def test_a_hub_that_keeps_something_else_is_noticed(hub: LocalHub, adapter: Resolved) -> None:
    def swallow(handler: Handler) -> bool:
        if handler.command == "PUT":
            handler.hub.blobs[handler.path.rpartition("/")[2]] = b"something else"
            handler.send(200)
        return handler.command == "PUT"

    hub.twist = swallow
    with pytest.raises(HubError, match="does not hold what was sent") as error:
        push(adapter, REPO)
    assert error.value.problems == ("adapter_model.safetensors has another sha256 there",)


def test_an_upload_that_fails_is_explained(hub: LocalHub, adapter: Resolved, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(handler: Handler) -> bool:
        if handler.command == "PUT":
            handler.send(403, {"error": "no"})
        return handler.command == "PUT"

    hub.twist = fail
    with pytest.raises(HubError, match="the upload to tester/emotion failed"):
        push(adapter, REPO)
    assert "README.md" not in hub.repos[REPO].commits[hub.repos[REPO].refs["main"]]


def test_search_finds_by_word_and_base_and_shows_register_and_mode(hub: LocalHub) -> None:
    tags = ["lora-rt", "peft", "register:emotion", "mode:bridge", "base_model:org/smol"]
    hub.commit("a/emotion-one", adapter_files(), tags=tags)
    hub.commit("a/other", adapter_files(), tags=["peft"])
    hub.commit("a/emotion-two", adapter_files(), tags=["lora-rt", "base_model:org/qwen"])
    assert [item.repo for item in search("emotion")] == ["a/emotion-one", "a/emotion-two"]
    (found,) = search(base="org/smol")
    assert (found.repo, found.register, found.mode, found.base) == ("a/emotion-one", "emotion", "bridge", "org/smol")
    assert [item.repo for item in search(every=True)] == ["a/emotion-one", "a/other"]
