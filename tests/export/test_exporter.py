"""Exports over one base: what is read of it, what is not, one key for every spelling, and which packages it takes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lora_rt
from lora_rt.core.base.identity import identify
from lora_rt.core.base.prepare import prepare_base
from lora_rt.core.base.source import parse_base
from lora_rt.core.export.run import Exporter
from lora_rt.registry import home
from lora_rt.registry.card import AdapterCard, write_card
from support.exports import Export
from support.hub import LocalHub
from support.tiny import Zoo

HEAVY = ("transformers", "peft", "bitsandbytes", "accelerate", "gguf")
BLOCKER = """
from importlib.machinery import PathFinder

find = PathFinder.find_spec

def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in {blocked!r} else find(name, path, target)

PathFinder.find_spec = staticmethod(find_spec)  # dill asks an instance
"""


def without(blocked: tuple[str, ...], code: str) -> str:
    """What a fresh Python prints that does not have these packages."""
    program = BLOCKER.format(blocked=set(blocked)) + code
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_registry_parsing_and_modes_import_without_torch() -> None:
    told = without(
        (*HEAVY, "torch"),
        "import lora_rt; from lora_rt.plugins.manager import load_modes\n"
        "names = [item.name for item in lora_rt.Registry(sources=load_modes().sources()).installed()]\n"
        "print(lora_rt.Composition.parse('emotion:0.7 logic:0.3'), names)",
    )
    assert told == "emotion:0.7 logic:0.3 ['archetype', 'body', 'bridge', 'emotion', 'logic']\n"


@pytest.mark.slow
def test_export_imports_without_the_libraries_that_load_a_model() -> None:
    assert without(HEAVY, "import lora_rt; print(lora_rt.Exporter.__name__, lora_rt.export.__name__)")


@pytest.mark.slow
def test_exporting_takes_transformers_alone(zoo: Zoo, exported: Export, tmp_path: Path) -> None:
    spec, base = f"{zoo.adapter('llama', seed=1)}:0.7 {zoo.adapter('llama', seed=2)}:-1", zoo.base("llama")
    code = (
        f"import lora_rt\nprint(lora_rt.export({spec!r}, 'peft', {str(tmp_path / 'out')!r}, base={str(base)!r}).sha256)"
    )
    assert without(HEAVY[1:], code).strip() == exported(spec).sha256


def test_exporting_for_the_default_base_prepares_none() -> None:
    gathered = Exporter("default").gather("emotion:0.7 logic:0.3")
    assert (gathered.rank, list(gathered.failures), list(gathered.dynamic)) == (16, [], [])
    assert not home.bases().exists()


def test_a_folder_that_we_prepared_is_the_base_that_its_manifest_names(zoo: Zoo, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    base = zoo.base("llama")
    prepared = prepare_base(parse_base(str(base)), "int4").folder
    adapter = shutil.copytree(zoo.adapter("llama", seed=1), tmp_path / "mine")
    write_card(adapter, AdapterCard(register="mine", mode="output-only", base=identify(parse_base(str(base)))))
    here, there = Exporter(str(base)), Exporter(str(prepared))
    assert there.base.identity == here.base.identity
    assert list(there.gather(f"{adapter}:0.5").failures) == []
    assert here.key(f"{adapter}:0.5") == there.key(f"{adapter}:0.5")


def test_a_repository_of_which_the_configuration_alone_is_here_has_no_digest(zoo: Zoo, hub: LocalHub) -> None:
    """It would be the digest of a file, and every adapter that states the true one would be refused."""
    hub.commit("someone/small", {"config.json": (zoo.base("llama") / "config.json").read_bytes()})
    assert Exporter("someone/small").base.identity.digest == ""


def test_a_composition_has_one_key_however_it_is_spelled(zoo: Zoo) -> None:
    a, b = zoo.adapter("llama", seed=1), zoo.adapter("llama", seed=2)
    exporter = Exporter(str(zoo.base("llama")))
    key = exporter.key(f"{a}:0.5 {b}:0.25")
    for spelling in (f"{b}:0.25 {a}:.5", f"{a}:0.25+{b}:0.25,{a}:0.25", f"{a}:0.5 {b}:0.25 {zoo.adapter('gpt2')}:0"):
        assert exporter.key(spelling) == key
    assert exporter.gather(f"{b}:0.25 {a}:.5").key == key
    others = (f"{a}:0.5 {b}:0.250001", f"{a}:0.25 {b}:0.5", f"{a}:0.5", f"{a}:0.5 {b}:0.25[So:]")
    assert len({key, *map(exporter.key, others)}) == 5


def test_a_changed_adapter_has_another_key(zoo: Zoo, tmp_path: Path) -> None:
    mine = shutil.copytree(zoo.adapter("llama", seed=1), tmp_path / "mine")
    exporter = Exporter(str(zoo.base("llama")))
    before = exporter.key(f"{mine}")
    config = json.loads((mine / "adapter_config.json").read_text())
    (mine / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 15}))
    assert exporter.key(f"{mine}") == exporter.gather(f"{mine}").key != before


def test_the_rank_of_a_composition_is_that_of_the_layer_where_most_act(zoo: Zoo) -> None:
    attention, mlp = zoo.adapter("llama", seed=1, r=4), zoo.adapter("llama", seed=4, r=2, targets=("up_proj",))
    biased = zoo.adapter("llama", seed=6, r=3, targets=("v_proj",), lora_bias=True)
    exporter = lora_rt.Exporter(str(zoo.base("llama")))
    assert exporter.gather(f"{attention} {mlp}").rank == 4
    assert exporter.gather(f"{attention} {biased} {biased}:2").rank == 7
    assert exporter.gather(f"{attention}:0").rank == 0
    assert [exporter.gather(f"{path}").has_biases for path in (attention, biased)] == [False, True]
