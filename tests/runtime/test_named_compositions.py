"""Named compositions in a runtime: what a name means there, how often it is looked up, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from lora_rt.core.runtime import Runtime
from lora_rt.errors import LoraRtError
from lora_rt.registry import compositions
from lora_rt.registry.compositions import NamedComposition, NamedCompositions, NamedTerm
from lora_rt.registry.registry import Registry
from support.tiny import Zoo, some_ids

IDS = some_ids()


@pytest.fixture
def runtime(zoo: Zoo) -> Runtime:
    return zoo.runtime("llama", fresh=True)


def save(runtime: Runtime, name: str, *terms: tuple[Path | str, float]) -> None:
    """A named composition for this runtime's base."""
    made = tuple(NamedTerm(reference=str(reference), weight=weight) for reference, weight in terms)
    Registry().compositions.save(NamedComposition(name=name, base=runtime.base.id, terms=made))


def test_an_adapter_that_was_loaded_under_a_name_comes_before_a_composition_of_that_name(
    runtime: Runtime, zoo: Zoo
) -> None:
    first, second = zoo.adapter("llama", seed=1), zoo.adapter("llama", seed=2)
    save(runtime, "logic", (first, 1.0))
    mixed = runtime.logits(IDS, compositions="logic")
    assert torch.equal(mixed, runtime.logits(IDS, compositions=str(first)))
    assert runtime.load_adapter(str(second), name="logic") == "logic"
    assert torch.equal(runtime.logits(IDS, compositions="logic"), runtime.logits(IDS, compositions=str(second)))
    runtime.unload_adapter("logic")
    assert torch.equal(runtime.logits(IDS, compositions="logic"), mixed)


def test_what_a_composition_loads_does_not_change_what_its_name_means(
    runtime: Runtime, zoo: Zoo, tmp_path: Path
) -> None:
    """The adapter's own name is that of the composition, and it is resident after the first request."""
    folder = tmp_path / "mine"
    shutil.copytree(zoo.adapter("llama", seed=1), folder)
    save(runtime, "mine", (folder, 0.5))
    first = runtime.logits(IDS, compositions="mine")
    assert "mine" in runtime.adapters
    assert torch.equal(runtime.logits(IDS, compositions="mine"), first)
    assert torch.equal(runtime.logits(IDS, compositions=f"{folder}:0.5"), first)


def test_a_name_is_looked_up_once_per_request_however_many_rows_have_it(
    runtime: Runtime, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime.load_adapter(str(zoo.adapter("llama", seed=1)), name="own")
    save(runtime, "mix", (zoo.adapter("llama", seed=2), 0.5), (zoo.adapter("llama", seed=3), 0.5))
    runtime.generate("x", "mix own", max_new_tokens=1)
    opened: list[str] = []
    plain = compositions.open_plain

    def counting(path: Path, limit: int) -> Any:
        opened.append(path.name)
        return plain(path, limit)

    monkeypatch.setattr(compositions, "open_plain", counting)
    runtime.generate(["x"] * 16, [f"mix:{n / 16} own:{n / 8}" for n in range(16)], max_new_tokens=2)
    assert opened == ["mix.json"]


def test_a_composition_inside_a_composition_is_refused_and_so_is_one_in_itself(runtime: Runtime, zoo: Zoo) -> None:
    save(runtime, "inner", (zoo.adapter("llama", seed=1), 1.0))
    save(runtime, "outer", ("inner", 1.0))
    save(runtime, "self", ("self", 1.0))
    for name, term in (("outer", "inner"), ("self", "self")):
        with pytest.raises(LoraRtError, match=f"'{term}' is a composition") as caught:
            runtime.logits(IDS, compositions=name)
        assert caught.value.next_step == f"lora-rt show {term} lists its adapters"
    with pytest.raises(LoraRtError, match="'inner' is a composition"):
        runtime.load_adapter("inner")


def test_a_name_that_is_nearly_that_of_a_composition_is_answered_with_it(runtime: Runtime, zoo: Zoo) -> None:
    save(runtime, "twilight", (zoo.adapter("llama", seed=1), 1.0))
    with pytest.raises(LoraRtError, match="did you mean 'twilight'"):
        runtime.logits(IDS, compositions="twiligth")


def test_a_damaged_composition_is_named(runtime: Runtime) -> None:
    folder = NamedCompositions(Registry().store.root / "mixes").folder
    folder.mkdir(parents=True)
    (folder / "torn.json").write_text('{"name": "to')
    with pytest.raises(LoraRtError, match="the composition 'torn' in the store is damaged") as caught:
        runtime.logits(IDS, compositions="torn")
    assert "lora-rt rm torn" in caught.value.next_step
