"""Pulling from the Hub, with the real client against a local server."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from contextlib import suppress
from pathlib import Path

import pytest
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError

from lora_rt.registry.errors import ChangedAdapterError, HubError, RejectedAdapterError
from lora_rt.registry.hub.pull import pull
from lora_rt.registry.reference import Reference
from lora_rt.registry.registry import Registry
from lora_rt.registry.store import Store
from support.adapters import adapter_files
from support.hub import LocalHub

REPO = "someone/emotion"


def test_a_pull_is_pinned_to_the_full_commit_and_the_sha256_of_each_file(hub: LocalHub, store: Store) -> None:
    commit = hub.commit(REPO, adapter_files(), tag="v1")
    found = pull(store, Reference.parse(f"{REPO}@v1"))
    assert (found.name, found.revision, found.requested, found.source) == ("emotion", commit, "v1", f"hub {REPO}")
    assert sorted(found.files) == sorted(adapter_files())
    assert (found.folder / "adapter_model.safetensors").read_bytes() == adapter_files()["adapter_model.safetensors"]


def test_the_name_given_with_as_is_the_one_it_gets(hub: LocalHub, registry: Registry) -> None:
    hub.commit(REPO, adapter_files())
    pull(registry.store, Reference.parse(REPO), name="mood")
    assert registry.resolve("mood").source == f"hub {REPO}"


def test_only_the_files_that_are_read_are_downloaded(hub: LocalHub, store: Store) -> None:
    hub.commit(REPO, {**adapter_files(), "adapter_model.bin": b"pickle", "train.py": b"x", "../up": b"x"})
    found = pull(store, Reference.parse(REPO))
    assert sorted(path.name for path in found.folder.iterdir()) == sorted(adapter_files())
    assert hub.downloads("adapter_model.bin") == hub.downloads("train.py") == 0


def test_a_second_pull_downloads_nothing(hub: LocalHub, store: Store) -> None:
    hub.commit(REPO, adapter_files())
    pull(store, Reference.parse(REPO))
    shutil.rmtree(os.environ["HF_HOME"])
    pull(store, Reference.parse(REPO))
    assert hub.downloads() == 1


def test_a_repository_resolves_from_the_store_without_a_request(hub: LocalHub, registry: Registry) -> None:
    hub.commit(REPO, adapter_files())
    first = registry.resolve(REPO)
    hub.requests.clear()
    assert registry.resolve(REPO).sha256 == first.sha256
    assert hub.requests == []


def test_offline_asks_nobody_and_says_what_to_type(hub: LocalHub, registry: Registry) -> None:
    hub.commit(REPO, adapter_files())
    with pytest.raises(HubError, match=f"lora-rt pull {REPO}"):
        registry.resolve(REPO, offline=True)
    assert hub.requests == []


def test_offline_a_commit_comes_from_the_clients_cache(
    hub: LocalHub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = hub.commit(REPO, adapter_files())
    first = pull(Store(home), Reference.parse(REPO))
    hub.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    found = pull(Store(home / "second"), Reference.parse(f"{REPO}@{commit}"))
    assert (found.sha256, found.files) == (first.sha256, first.files)
    assert pull(Store(home), Reference.parse(REPO)).sha256 == first.sha256
    assert hub.requests == []


def _cached(hub: LocalHub, *names: str, **facts: bool) -> str:
    """A commit of which another program has fetched these files; the commit."""
    commit = hub.commit(REPO, adapter_files(**facts))
    for name in names:
        with suppress(EntryNotFoundError):
            hf_hub_download(REPO, name)
    return commit


def test_offline_an_adapter_without_the_card_that_it_may_have_is_told_and_not_kept_for_good(
    hub: LocalHub, store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    """PEFT, vLLM and others fetch the two files of a bare adapter."""
    _cached(hub, "adapter_config.json", "adapter_model.safetensors")
    assert "register.json" not in pull(store, Reference.parse(REPO), offline=True).files
    assert "without register.json, if it has any; online, lora-rt pull" in caplog.text
    assert "register.json" in pull(store, Reference.parse(REPO)).files
    assert "register.json" in pull(store, Reference.parse(REPO), offline=True).files
    assert len(store.installed()) == 1


@pytest.mark.parametrize("how", ["asked for", "pulled", "downloaded whole"])
def test_offline_an_adapter_without_a_card_is_taken_where_the_cache_knows_that_it_has_none(
    hub: LocalHub, home: Path, how: str
) -> None:
    names = ["adapter_config.json", "adapter_model.safetensors", "README.md", "register.json"]
    commit = _cached(hub, *(names if how == "asked for" else []), card=False)
    if how == "pulled":
        pull(Store(home / "first"), Reference.parse(REPO))
    if how == "downloaded whole":
        snapshot_download(REPO)
    found = pull(Store(home), Reference.parse(f"{REPO}@{commit}"), offline=True)
    assert sorted(found.files) == sorted(adapter_files(card=False))


def test_a_moved_tag_is_found(hub: LocalHub, store: Store) -> None:
    hub.commit(REPO, adapter_files(), tag="v1")
    pull(store, Reference.parse(f"{REPO}@v1"))
    hub.commit(REPO, adapter_files(seed=1), tag="v1")
    with pytest.raises(ChangedAdapterError, match="moved"):
        pull(store, Reference.parse(f"{REPO}@v1"))


def test_main_may_move_and_the_name_follows(hub: LocalHub, store: Store) -> None:
    hub.commit(REPO, adapter_files())
    old = pull(store, Reference.parse(REPO))
    commit = hub.commit(REPO, adapter_files(seed=1))
    assert pull(store, Reference.parse(REPO)).revision == commit
    assert not old.folder.exists()


@pytest.mark.parametrize(
    ("facts", "text", "says"),
    [
        ({}, "no/where", "no no/where, or it is private"),
        ({"token": "secret"}, REPO, "private"),
        ({"token": "secret", "gated": True}, REPO, "gated"),
        ({}, f"{REPO}@v9", "no revision 'v9'"),
    ],
)
def test_what_the_hub_refuses_is_explained(
    hub: LocalHub, store: Store, facts: dict[str, object], text: str, says: str
) -> None:
    hub.commit(REPO, adapter_files(), **facts)
    with pytest.raises(HubError, match=says):
        pull(store, Reference.parse(text))


def test_a_private_repository_opens_with_the_token(
    hub: LocalHub, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit(REPO, adapter_files(), token="hf_secret")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert pull(store, Reference.parse(REPO)).name == "emotion"


def test_an_adapter_that_fails_the_check_leaves_no_trace_in_the_store(hub: LocalHub, store: Store) -> None:
    hub.commit(REPO, {**adapter_files(), "adapter_config.json": b"{}"})
    with pytest.raises(RejectedAdapterError):
        pull(store, Reference.parse(REPO))
    assert store.installed() == []
    assert store.orphans() == []


def test_a_damaged_file_in_the_cache_is_downloaded_again(hub: LocalHub, home: Path) -> None:
    hub.commit(REPO, adapter_files())
    pull(Store(home), Reference.parse(REPO))
    from huggingface_hub import constants

    blob = next(
        path
        for path in Path(constants.HF_HUB_CACHE, "models--someone--emotion", "blobs").iterdir()
        if path.read_bytes() == adapter_files()["adapter_model.safetensors"]
    )
    content = bytearray(blob.read_bytes())
    content[-1] ^= 1
    blob.write_bytes(bytes(content))
    found = pull(Store(home / "second"), Reference.parse(REPO))
    assert (found.folder / "adapter_model.safetensors").read_bytes() == adapter_files()["adapter_model.safetensors"]


def _pull_once(home: Path, results: multiprocessing.SimpleQueue[str]) -> None:
    results.put(pull(Store(home), Reference.parse(REPO)).sha256)


@pytest.mark.slow
def test_eight_simultaneous_pulls_make_one_download_and_one_result(hub: LocalHub, home: Path) -> None:
    hub.commit(REPO, adapter_files(seed=8))
    fork = multiprocessing.get_context("fork")
    results: multiprocessing.SimpleQueue[str] = fork.SimpleQueue()
    workers = [fork.Process(target=_pull_once, args=(home, results)) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    digests = {results.get() for _ in range(8)}
    assert len(digests) == 1
    assert len(Store(home).installed()) == 1
    assert hub.downloads() == 1
