"""An adapter in a folder of a repository or below a path, in parts, and in the Hub client's own cache."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save

from lora_rt.registry.errors import InvalidReferenceError, RejectedAdapterError, UnknownAdapterError
from lora_rt.registry.hub.pull import pull
from lora_rt.registry.inspection import inspect_adapter
from lora_rt.registry.reference import Reference
from lora_rt.registry.registry import Registry
from lora_rt.registry.sync import make_lock, sync
from support.adapters import LINEARS, adapter_files, tensors, write_adapter
from support.hub import LocalHub

REPO = "someone/registers"


def _repository() -> dict[str, bytes]:
    moods = {f"moods/emotion/{name}": content for name, content in adapter_files(seed=1).items()}
    return {"README.md": b"# several", "logic/adapter_config.json": b"{}", **moods}


@pytest.mark.parametrize("revision", ["", "@v1"])
def test_a_folder_of_a_repository_is_pulled_by_its_own_reference(
    hub: LocalHub, registry: Registry, revision: str
) -> None:
    commit = hub.commit(REPO, _repository(), tag="v1")
    found = pull(registry.store, Reference.parse(f"{REPO}//moods/emotion{revision}"))
    assert (found.name, found.revision, found.source) == ("emotion", commit, f"hub {REPO}//moods/emotion")
    assert found.sha256 == _digest_of(registry.folder / "same")
    assert registry.resolve(f"{REPO}//moods/emotion{revision}").sha256 == found.sha256


def test_the_longest_reference_to_a_folder_is_pulled(hub: LocalHub, registry: Registry) -> None:
    folder = "/".join(["d" * 32] * 6)
    hub.commit("someone/mood", {f"{folder}/{name}": content for name, content in adapter_files().items()})
    reference = f"someone/mood//{folder}"
    assert registry.resolve(reference).sha256 == pull(registry.store, Reference.parse(reference), name="deep").sha256


def _digest_of(place: Path) -> str:
    return inspect_adapter(write_adapter(place, adapter_files(seed=1)), name="same").sha256


def test_a_folder_of_a_repository_is_locked_and_synced(hub: LocalHub, registry: Registry) -> None:
    hub.commit(REPO, _repository(), tag="v1")
    source = f"{REPO}//moods/emotion@v1"
    (registry.folder / "lora-rt.toml").write_text(f'[adapters]\nmood = "{source}"\n')
    entries, _ = make_lock(registry)
    assert [entry.source for entry in entries] == [source]
    shutil.rmtree(registry.store.root)
    (installed,), changed = sync(registry, frozen=True)
    assert not changed
    assert registry.resolve("mood").sha256 == installed.sha256 == entries[0].sha256


def test_a_repository_whose_adapters_are_in_folders_says_where(hub: LocalHub, registry: Registry) -> None:
    hub.commit(REPO, _repository())
    with pytest.raises(RejectedAdapterError) as refusal:
        pull(registry.store, Reference.parse(REPO))
    assert f"{REPO}//logic, {REPO}//moods/emotion" in refusal.value.next_step


@pytest.mark.parametrize(
    "text", ["a/b//", "a/b//../c", "a/b///c", "a/b//c//d", "a//b", "a/b@v1//c", "a/b//" + "c" * 300]
)
def test_a_folder_that_could_lead_elsewhere_is_not_a_reference(text: str) -> None:
    with pytest.raises(InvalidReferenceError):
        Reference.parse(text)


def test_a_folder_with_one_adapter_below_says_how_to_name_it(registry: Registry) -> None:
    write_adapter(registry.folder / "out" / "checkpoint-30")
    with pytest.raises(UnknownAdapterError) as refusal:
        registry.resolve("./out")
    assert refusal.value.next_step == "Use ./out/checkpoint-30"
    write_adapter(registry.folder / "out" / "checkpoint-60")
    with pytest.raises(UnknownAdapterError) as refusal:
        registry.resolve("./out")
    assert refusal.value.problems == ("'./out/checkpoint-30'", "'./out/checkpoint-60'")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"model.safetensors": b"x", "config.json": b"{}"}, "a whole model"),
        ({"adapters.safetensors": b"x"}, "written by MLX"),
        ({"lora.gguf": b"GGUF"}, "llama.cpp"),
        ({"adapter_model.bin": b"x"}, "pickle"),
        ({"pytorch_lora_weights.safetensors": b"x"}, "image model"),
    ],
)
def test_a_folder_that_is_something_else_is_told_by_its_files(
    files: dict[str, bytes], says: str, registry: Registry
) -> None:
    write_adapter(registry.folder / "thing", files)
    with pytest.raises(UnknownAdapterError, match=says):
        registry.resolve("./thing")


def test_the_home_of_nobody_and_a_name_of_5000_letters_are_answered_in_words(registry: Registry) -> None:
    with pytest.raises(InvalidReferenceError, match="no user"):
        registry.resolve("~nobody-of-this-name/x")
    with pytest.raises(InvalidReferenceError, match="too long"):
        registry.resolve("./" + "a" * 5000)


def _in_parts(folder: Path, count: int = 3) -> Path:
    """A good adapter whose weights are in several files."""
    write_adapter(folder)
    (folder / "adapter_model.safetensors").unlink()
    found = sorted(tensors().items())
    index = {}
    for number in range(count):
        name = f"adapter_model-{number + 1:05}-of-{count:05}.safetensors"
        part = dict(found[number::count])
        (folder / name).write_bytes(save(part))
        index |= dict.fromkeys(part, name)
    (folder / "adapter_model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return folder


def test_weights_in_parts_are_the_weights_of_one_file(tmp_path: Path, registry: Registry) -> None:
    parts = inspect_adapter(_in_parts(tmp_path / "parts"), name="parts", linears=LINEARS, load=True)
    whole = inspect_adapter(write_adapter(tmp_path / "whole"), name="whole", linears=LINEARS, load=True)
    assert parts.modules == whole.modules
    assert all(np.array_equal(parts.tensors[key].data, tensor.data) for key, tensor in whole.tensors.items())
    with registry.store.staging() as staged:
        shutil.copytree(_in_parts(tmp_path / "again"), staged, dirs_exist_ok=True)
        registry.store.publish(staged, "parts", source="test", revision=None)
    assert registry.resolve("parts").sha256 == parts.sha256


def test_weights_in_parts_are_pulled(hub: LocalHub, registry: Registry, tmp_path: Path) -> None:
    folder = _in_parts(tmp_path / "parts")
    hub.commit(REPO, {path.name: path.read_bytes() for path in folder.iterdir()})
    assert pull(registry.store, Reference.parse(REPO)).sha256 == inspect_adapter(folder, name="parts").sha256


def _snapshot(root: Path, repo: str) -> Path:
    """A repository as the Hub client caches it: a snapshot of links into blobs."""
    place = root / f"models--{repo.replace('/', '--')}"
    snapshot = place / "snapshots" / ("a" * 40)
    (place / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, (name, content) in enumerate(adapter_files().items()):
        (place / "blobs" / f"{number:064}").write_bytes(content)
        (snapshot / name).symlink_to(Path("../../blobs") / f"{number:064}")
    return snapshot


def test_a_snapshot_of_the_hub_clients_cache_is_an_adapter(tmp_path: Path, registry: Registry) -> None:
    snapshot = _snapshot(tmp_path / "hub", "a/b")
    assert registry.resolve(str(snapshot)).sha256 == inspect_adapter(snapshot, name="b", linears=LINEARS).sha256


def test_a_snapshot_whose_link_leaves_its_repository_is_refused(tmp_path: Path) -> None:
    snapshot, other = _snapshot(tmp_path / "hub", "a/b"), _snapshot(tmp_path / "hub", "a/c")
    weights = "adapter_model.safetensors"
    (snapshot / weights).unlink()
    (snapshot / weights).symlink_to((other / weights).resolve())
    with pytest.raises(RejectedAdapterError, match="one thing is wrong") as refusal:
        inspect_adapter(snapshot, name="b")
    assert "symbolic link" in refusal.value.problems[0]


def test_what_the_hub_clients_cache_has_is_found_by_its_id_where_nobody_is_asked(
    hub: LocalHub, registry: Registry
) -> None:
    from huggingface_hub import snapshot_download

    hub.commit(REPO, _repository())
    snapshot_download(REPO)
    hub.requests.clear()
    found = registry.find(f"{REPO}//moods/emotion", offline=True)
    assert found.sha256 == _digest_of(registry.folder / "same")
    assert hub.requests == []
