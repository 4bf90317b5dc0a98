"""Which names pulled adapters get in the store, and who keeps a name."""

from __future__ import annotations

import shutil
import unicodedata
from pathlib import Path

import pytest

from lora_rt.core.step.settings import TrainSettings
from lora_rt.errors import LoraRtError
from lora_rt.registry.card import BaseIdentity
from lora_rt.registry.errors import StoreError, UnknownAdapterError
from lora_rt.registry.hub.pull import pull
from lora_rt.registry.reference import InvalidReferenceError, Reference, is_name
from lora_rt.registry.registry import Registry
from lora_rt.registry.sync import make_lock
from support.adapters import adapter_files
from support.hub import LocalHub
from support.tiny import Zoo

SMOL = {"id": "org/smol", "revision": None, "digest": "a1"}
QWEN = {"id": "org/qwen", "revision": None, "digest": "b2"}


def test_one_name_may_come_from_two_repositories_for_two_bases(hub: LocalHub, registry: Registry) -> None:
    hub.commit("a/voice-smol", adapter_files(base=SMOL))
    hub.commit("a/voice-qwen", adapter_files(base=QWEN))
    for repo in ("a/voice-smol", "a/voice-qwen"):
        pull(registry.store, Reference.parse(repo), name="voice")
    assert registry.resolve("voice", BaseIdentity(**SMOL)).source == "hub a/voice-smol"
    assert registry.resolve("voice", BaseIdentity(**QWEN)).source == "hub a/voice-qwen"


def test_a_name_is_never_taken_over_for_the_same_base(hub: LocalHub, registry: Registry) -> None:
    hub.commit("a/voice", adapter_files(base=SMOL))
    hub.commit("mallory/voice", adapter_files(base=SMOL, seed=1))
    hub.commit("mallory/any", adapter_files(card=False, seed=1))
    first = pull(registry.store, Reference.parse("a/voice"))
    with pytest.raises(StoreError, match="belongs to an adapter from hub a/voice"):
        pull(registry.store, Reference.parse("mallory/voice"))
    with pytest.raises(StoreError, match="belongs to an adapter from hub a/voice"):
        pull(registry.store, Reference.parse("mallory/any"), name="voice")
    assert registry.resolve("voice").sha256 == first.sha256


def test_a_repository_that_is_used_by_its_id_takes_no_name(hub: LocalHub, registry: Registry) -> None:
    hub.commit("a/voice", adapter_files(base=SMOL))
    hub.commit("b/voice", adapter_files(base=SMOL, seed=1))
    registry.resolve("a/voice")
    assert registry.resolve("b/voice").source == "hub b/voice"
    with pytest.raises(UnknownAdapterError):
        registry.resolve("voice")


def test_a_repository_without_a_revision_is_its_main_not_a_tag_that_was_pulled(
    hub: LocalHub, registry: Registry
) -> None:
    old = hub.commit("a/voice", adapter_files(), tag="v1")
    new = hub.commit("a/voice", adapter_files(seed=1))
    assert registry.resolve("a/voice@v1").revision == old
    assert registry.resolve("a/voice").revision == new
    assert registry.resolve("a/voice@v1").revision == old


def test_a_repository_is_what_was_pulled_last_whatever_used_it_before(hub: LocalHub, registry: Registry) -> None:
    old = hub.commit("a/voice", adapter_files())
    assert registry.resolve("a/voice").revision == old
    new = hub.commit("a/voice", adapter_files(seed=1))
    pull(registry.store, Reference.parse("a/voice"))
    assert registry.resolve("a/voice").revision == registry.resolve("voice").revision == new
    assert [item.revision for item in registry.store.installed()] == [new]


def test_a_repository_is_what_was_pulled_last_whatever_has_names(hub: LocalHub, registry: Registry) -> None:
    """Also where its main goes back to a commit that has a name already."""
    commits = {}
    for seed, name in enumerate(("first", "second", "third")):
        commits[name] = hub.commit("a/voice", adapter_files(seed=seed))
        pull(registry.store, Reference.parse("a/voice"), name=name)
        assert registry.resolve("a/voice").revision == commits[name]
    assert {name: registry.resolve(name).revision for name in commits} == commits
    hub.repos["a/voice"].refs["main"] = commits["second"]
    pull(registry.store, Reference.parse("a/voice"), name="second")
    assert registry.resolve("a/voice").revision == commits["second"]
    hub.repos["a/voice"].refs["main"] = commits["first"]
    (registry.folder / "lora-rt.toml").write_text('[adapters]\nmood = "a/voice"\n')
    assert [entry.revision for entry in make_lock(registry)[0]] == [commits["first"]]
    assert registry.resolve("a/voice").revision == commits["first"]


@pytest.mark.parametrize("name", ["море", "日本語", "é", "emotion-море", "नमस्ते"])
def test_a_name_is_written_in_any_script(name: str) -> None:
    assert is_name(name)
    assert Reference.parse(unicodedata.normalize("NFD", name)).target == name


@pytest.mark.parametrize(
    "name", ["a\u202eb", "a\u200bb", "\u0301a", "ﬁ", "мо ре", "мо/ре", "-море", "море.", "м\x1b", "м" * 97]
)
def test_signs_that_hide_or_turn_a_name_are_no_letters(name: str) -> None:
    assert not is_name(name)


def test_nothing_new_is_called_what_the_base_alone_is(hub: LocalHub, registry: Registry) -> None:
    """A server and tables mean the base alone by it, whatever the store holds."""
    hub.commit("a/base", adapter_files())
    with pytest.raises(InvalidReferenceError, match="'base' means the base alone"):
        pull(registry.store, Reference.parse("a/base"))
    assert "base" not in registry.names()
    assert pull(registry.store, Reference.parse("a/base"), name="mine").name == "mine"
    with pytest.raises(LoraRtError) as caught:
        TrainSettings(register="base", mode="output-only", data=Path("d"), held_out=Path("h")).check()
    assert "'base' means the base alone" in " ".join(caught.value.problems)


def test_a_folder_of_that_name_is_another_one(zoo: Zoo, tmp_path: Path) -> None:
    folder = shutil.copytree(zoo.adapter("llama", seed=1), tmp_path / "base")
    runtime = zoo.runtime("llama", fresh=True)
    assert runtime.load_adapter(str(folder)) == "base-adapter"
    with pytest.raises(InvalidReferenceError, match="means the base alone"):
        runtime.load_adapter(str(folder), name="base")
