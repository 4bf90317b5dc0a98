"""Plain PEFT over an exported adapter gives the logits of the composition, whatever it was made of."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from lora_rt.core.export import ExportError
from lora_rt.core.export.peft import shortest_names
from lora_rt.core.export.run import export
from lora_rt.errors import LoraRtError
from lora_rt.registry.compositions import NamedComposition, NamedTerm
from lora_rt.registry.registry import Registry
from support.exports import Export
from support.tiny import Zoo, dense_logits, peft_model, some_ids

EXACT = {"atol": 1e-4, "rtol": 0.0}
IDS = some_ids(rows=2)


def peft_logits(base: Path, adapter: Path) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = peft_model(base, adapter)(input_ids=IDS).logits
    return logits


def text(terms: Sequence[tuple[Path, float]]) -> str:
    return " ".join(f"{path}:{weight!r}" for path, weight in terms)


def config(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text())
    return found


@pytest.mark.slow
def test_any_composition(zoo: Zoo, pool: list[Path], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Mixed ranks, scalings, layers and biases; weights of either sign and over 1; the same adapter twice."""
    from hypothesis import given, settings
    from hypothesis import strategies as st

    base, runtime = zoo.base("llama"), zoo.runtime("llama")
    terms_of_any = st.lists(st.tuples(st.integers(0, 5), st.floats(-2, 3, width=16)), min_size=1, max_size=5)

    @settings(max_examples=15, deadline=None, derandomize=True)
    @given(chosen=terms_of_any)
    def hold(chosen: list[tuple[int, float]]) -> None:
        terms = [(pool[index], weight) for index, weight in chosen]
        totals = {path: sum(w for other, w in terms if other == path) for path, _ in terms}
        out = tmp_path_factory.mktemp("any") / "out"
        if not any(totals.values()):
            with pytest.raises(ExportError, match="every weight of this composition is 0"):
                export(text(terms), "peft", out, base=str(base))
            return
        export(text(terms), "peft", out, base=str(base))
        found = peft_logits(base, out)
        assert_close(found, runtime.logits(IDS, compositions=text(terms)), **EXACT)
        assert_close(found, dense_logits(base, terms, IDS), **EXACT)

    hold()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "opt", "gpt_neox", "qwen3"])
def test_other_architectures(zoo: Zoo, exported: Export, architecture: str) -> None:
    base = zoo.base(architecture)
    terms = [(zoo.adapter(architecture, seed=1), 0.7), (zoo.adapter(architecture, seed=2, r=3, use_rslora=True), -1.2)]
    done = exported(text(terms), architecture=architecture)
    assert_close(peft_logits(base, done.path), dense_logits(base, terms, IDS), **EXACT)
    assert config(done.path)["fan_in_fan_out"] is (architecture == "gpt2")


def test_weights_per_layer_are_kept(zoo: Zoo, exported: Export, pool: list[Path]) -> None:
    """Not their mean: in one layer the first adapter is off, and its rank is gone there."""
    base = zoo.base("llama")
    first = NamedTerm(reference=str(pool[0]), weight=2.0, layers=(0.0, 0.4))
    second = NamedTerm(reference=str(pool[5]), layers=(-0.5, 1.0))  # has an output head, outside of all layers
    Registry().compositions.save(NamedComposition(name="mine", base=base.name, terms=(first, second)))
    done = exported(f"mine:0.5 {pool[1]}:0.25")
    runtime = zoo.runtime("llama", fresh=True)
    wanted = runtime.logits(IDS, compositions=f"mine:0.5 {pool[1]}:0.25")
    assert_close(peft_logits(base, done.path), wanted, **EXACT)
    mean = runtime.logits(IDS, compositions=f"{pool[0]}:0.2 {pool[5]}:0.125 {pool[1]}:0.25")
    assert not torch.allclose(wanted, mean, atol=1e-2)
    tensors = load_file(done.path / "adapter_model.safetensors")
    ranks = [len(tensors[f"base_model.model.model.layers.{n}.self_attn.q_proj.lora_A.weight"]) for n in (0, 1)]
    assert ranks == [6, 10]
    assert done.document()["terms"][0]["layers"] == [0.0, 0.4]


def test_a_named_composition_tuned_for_other_files_is_refused(zoo: Zoo, exported: Export, pool: list[Path]) -> None:
    stale = NamedTerm(reference=str(pool[0]), sha256="0" * 64)
    Registry().compositions.save(NamedComposition(name="stale", base=zoo.base("llama").name, terms=(stale,)))
    with pytest.raises(LoraRtError, match="was tuned for other files"):
        exported("stale")


def test_the_scaling_is_one_at_every_rank(exported: Export, pool: list[Path]) -> None:
    """So that readers without patterns compute the same."""
    found = config(exported(f"{pool[0]}:0.5 {pool[2]}:2 {pool[4]}").path)
    assert found["lora_alpha"] == found["r"] == 17
    assert found["use_rslora"] is False
    assert found["rank_pattern"] == found["alpha_pattern"] != {}
    assert found["base_model_name_or_path"]


def test_modules_are_named_as_shortly_as_can_be(exported: Export, pool: list[Path]) -> None:
    assert config(exported(str(pool[0])).path)["target_modules"] == ["k_proj", "o_proj", "q_proj", "v_proj"]
    whole = ["model.layers.1.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
    assert config(exported(str(pool[4])).path)["target_modules"] == whole


def test_a_short_name_never_means_another_module() -> None:
    among = ["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.1.attn.c_proj", "h.1.mlp.c_proj", "h.0.mlp.c_fc", "lm_head"]
    assert shortest_names(["h.0.attn.c_proj", "h.1.attn.c_proj"], among) == ["attn.c_proj"]
    assert shortest_names(["h.0.attn.c_proj", "h.0.mlp.c_proj"], among) == ["h.0.attn.c_proj", "h.0.mlp.c_proj"]
    assert shortest_names(["h.0.mlp.c_fc", "lm_head"], among) == ["c_fc", "lm_head"]


def test_the_export_is_an_adapter_of_ours(zoo: Zoo, exported: Export, pool: list[Path]) -> None:
    spec = f"{pool[0]}:0.5 {pool[2]}:-1 {pool[5]}:2"
    done = exported(spec)
    runtime = zoo.runtime("llama", fresh=True)
    name = runtime.load_adapter(str(done.path), "mixed")
    info = runtime.adapters[name]
    assert (info.mode, info.register) == ("output-only", f"{pool[0].name}:0.5 {pool[2].name}:-1 {pool[5].name}:2")
    assert info.card is not None
    assert [key for key in info.card.training if key.startswith("adapter")] == ["adapter 1", "adapter 2", "adapter 3"]
    wanted = runtime.logits(IDS, compositions=spec)
    assert_close(runtime.logits(IDS, compositions="mixed"), wanted, **EXACT)


def test_the_same_export_has_the_same_bytes_and_no_paths(exported: Export, pool: list[Path]) -> None:
    first, second = (exported(f"{pool[1]}:0.5 {pool[3]}") for _ in range(2))
    assert first.sha256 == second.sha256
    for path in first.path.iterdir():
        assert path.read_bytes() == (second.path / path.name).read_bytes()
        assert str(pool[1].parent).encode() not in path.read_bytes()


def test_half_precision_is_saved_and_what_it_can_not_hold_is_refused(exported: Export, pool: list[Path]) -> None:
    done = exported(str(pool[0]), dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(done.path / "adapter_model.safetensors").values()} == {torch.bfloat16}
    with pytest.raises(ExportError, match="float16 can't hold") as caught:
        exported(f"{pool[0]}:1e9", dtype=torch.float16)
    assert len(caught.value.problems) == 8


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dora": True}, "holds DoRA"),
        ({"targets": ("q_proj", "embed_tokens")}, "holds a LoRA of the embedding"),
        ({"modules_to_save": ["lm_head"]}, "holds modules that were trained as a whole"),
        ({"trainable_token_indices": [9, 10]}, "holds trained token rows"),
        ({"alora_invocation_tokens": [9, 10]}, "holds tokens that wake it up"),
    ],
)
def test_what_is_not_exported_is_named_as_what_it_is_and_counts_for_nothing_at_weight_0(
    zoo: Zoo, exported: Export, pool: list[Path], options: dict[str, Any], said: str
) -> None:
    adapter = zoo.adapter("llama", seed=11, **options)
    with pytest.raises(ExportError, match=f"{said}.* which is not exported") as caught:
        exported(f"{pool[0]} {adapter}")
    if "alora_invocation_tokens" in options:  # which PEFT can't merge
        assert caught.value.next_step == "Compose with it at run time"
    done = exported(f"{pool[0]} {adapter}:0")
    assert_close(
        peft_logits(zoo.base("llama"), done.path), dense_logits(zoo.base("llama"), [(pool[0], 1.0)], IDS), **EXACT
    )


def test_weights_beyond_what_an_adapter_may_hold_are_what_is_wrong(exported: Export, pool: list[Path]) -> None:
    with pytest.raises(ExportError, match="as one adapter this composition is beyond") as caught:
        exported(f"{pool[0]}:1e30")
    assert caught.value.next_step == "Give smaller weights, or fewer adapters"
    assert any("is not sane" in problem for problem in caught.value.problems)
