"""Adapters become resident under one name each, a name never means two, and what can't be used is explained."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from lora_rt.core.runtime import Runtime
from lora_rt.errors import LoraRtError
from lora_rt.registry.errors import UnknownAdapterError
from support.hub import LocalHub
from support.tiny import Zoo, dense_logits, some_ids

IDS = some_ids(rows=1)
EXACT = {"atol": 1e-4, "rtol": 0.0}


@pytest.fixture
def runtime(zoo: Zoo) -> Runtime:
    return zoo.runtime("llama", fresh=True)


def put(zoo: Zoo, folder: Path, seed: int) -> Path:
    shutil.copytree(zoo.adapter("llama", seed=seed), folder)
    return folder


def test_a_path_in_a_composition_is_loaded_when_it_is_first_used(runtime: Runtime, zoo: Zoo, tmp_path: Path) -> None:
    folder = put(zoo, tmp_path / "mine", 1)
    found = runtime.logits(IDS, compositions=f"{folder}:0.5")
    assert_close(found, dense_logits(zoo.base("llama"), [(folder, 0.5)], IDS), **EXACT)
    assert list(runtime.adapters) == ["mine"]
    assert torch.equal(runtime.logits(IDS, compositions="mine:0.5"), found)


def test_a_path_means_the_files_that_are_there_now(runtime: Runtime, zoo: Zoo, tmp_path: Path) -> None:
    """Who trains anew in a notebook asks for the same path again."""
    folder = put(zoo, tmp_path / "mine", 1)
    first = runtime.logits(IDS, compositions=f"{folder}:0.5")
    shutil.rmtree(folder)
    assert torch.equal(runtime.logits(IDS, compositions=f"{folder}:0.5"), first)  # gone, and still in memory
    put(zoo, folder, 2)
    found = runtime.logits(IDS, compositions=f"{folder}:0.5")
    assert_close(found, dense_logits(zoo.base("llama"), [(folder, 0.5)], IDS), **EXACT)
    assert list(runtime.adapters) == ["mine"]


def test_a_repository_that_is_resident_by_its_id_gives_its_name_no_meaning(
    runtime: Runtime, zoo: Zoo, tmp_path: Path, hub: LocalHub
) -> None:
    files = {path.name: path.read_bytes() for path in zoo.adapter("llama", seed=1).iterdir()}
    hub.commit("evil/feelings", files)
    found = runtime.logits(IDS, compositions="evil/feelings:0.5")
    assert list(runtime.adapters) == ["feelings"]
    with pytest.raises(UnknownAdapterError):
        runtime.logits(IDS, compositions="feelings:0.5")
    assert torch.equal(runtime.logits(IDS, compositions="evil/feelings:0.5"), found)
    runtime.load_adapter("evil/feelings", name="feelings")  # the caller's own word
    assert torch.equal(runtime.logits(IDS, compositions="feelings:0.5"), found)


def test_two_adapters_of_one_name_stand_side_by_side(runtime: Runtime, zoo: Zoo, tmp_path: Path) -> None:
    first, second = put(zoo, tmp_path / "a" / "mine", 1), put(zoo, tmp_path / "b" / "mine", 2)
    assert runtime.load_adapter(str(first)) == "mine"
    name = runtime.load_adapter(str(second))
    assert name == f"mine-{runtime.adapters[name].sha256[:8]}"
    for folder in (first, second):
        wanted = dense_logits(zoo.base("llama"), [(folder, 1.0)], IDS)
        assert_close(runtime.logits(IDS, compositions=str(folder)), wanted, **EXACT)


def test_a_path_means_its_own_adapter_after_another_took_its_name(runtime: Runtime, zoo: Zoo, tmp_path: Path) -> None:
    first, second = put(zoo, tmp_path / "mine", 1), put(zoo, tmp_path / "other", 2)
    runtime.load_adapter(str(first))
    runtime.load_adapter(str(second), name="mine")
    wanted = dense_logits(zoo.base("llama"), [(first, 1.0)], IDS)
    assert_close(runtime.logits(IDS, compositions=str(first)), wanted, **EXACT)
    wanted = dense_logits(zoo.base("llama"), [(second, 1.0)], IDS)
    assert_close(runtime.logits(IDS, compositions="mine"), wanted, **EXACT)


def test_a_resident_adapter_does_not_change_with_its_file(runtime: Runtime, zoo: Zoo, tmp_path: Path) -> None:
    folder = put(zoo, tmp_path / "mine", 1)
    name = runtime.load_adapter(str(folder))
    weights = folder / "adapter_model.safetensors"
    with weights.open("r+b") as file:
        file.seek(weights.stat().st_size // 4)
        file.write(b"\x3f" * (weights.stat().st_size // 2))
    wanted = dense_logits(zoo.base("llama"), [(zoo.adapter("llama", seed=1), 1.0)], IDS)
    assert_close(runtime.logits(IDS, compositions=name), wanted, **EXACT)


def test_every_bad_term_of_a_composition_is_named(runtime: Runtime) -> None:
    with pytest.raises(LoraRtError) as caught:
        runtime.generate("x", "nobody:1 ./nowhere:2")
    assert "2 terms" in caught.value.message
    assert "nobody" in str(caught.value)
    assert "nowhere" in str(caught.value)


def test_an_adapter_for_other_shapes_is_refused_with_all_mismatches(runtime: Runtime, zoo: Zoo) -> None:
    wider = zoo.adapter("llama", changes={"hidden_size": 128, "num_hidden_layers": 3}, seed=9)
    with pytest.raises(LoraRtError) as caught:
        runtime.load_adapter(str(wider))
    found = "\n".join(caught.value.problems)
    assert "(8, 128), should be (8, 64)" in found
    for layer in range(3):
        for leaf in ("q_proj", "k_proj", "v_proj", "o_proj"):
            assert f"layers.{layer}.self_attn.{leaf}" in found
    assert dict(runtime.adapters) == {}


def test_an_adapter_of_another_architecture_is_refused(runtime: Runtime, zoo: Zoo) -> None:
    with pytest.raises(LoraRtError, match="refused"):
        runtime.load_adapter(str(zoo.adapter("gpt2", seed=9)))


def test_unloading_what_is_not_there_and_impossible_names_are_explained(runtime: Runtime, zoo: Zoo) -> None:
    with pytest.raises(LoraRtError, match="'ghost' is resident; there are: none"):
        runtime.unload_adapter("ghost")
    with pytest.raises(LoraRtError, match="is not a name"):
        runtime.load_adapter(str(zoo.adapter("llama", seed=1)), name="a b")


def test_what_is_known_of_a_resident_adapter_is_told(runtime: Runtime, zoo: Zoo) -> None:
    name = runtime.load_adapter(str(zoo.adapter("llama", seed=1, r=8, rank_pattern={"q_proj": 12})))
    info = runtime.adapters[name]
    assert (info.mode, info.rank, info.modules, info.revision, info.card) == ("output-only", 12, 8, None, None)
    assert len(info.sha256) == 64
