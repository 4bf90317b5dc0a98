"""A merged model is an ordinary transformers folder with the logits of the composition over the dense base."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from lora_rt.core.base.source import BaseError
from lora_rt.core.export import ExportError
from support.exports import Export
from support.tiny import Zoo, dense_logits, dense_model, some_ids

pytestmark = pytest.mark.slow

EXACT = {"atol": 1e-4, "rtol": 0.0}
IDS = some_ids(rows=2)


def logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.inference_mode():
        found: torch.Tensor = model(input_ids=IDS).logits
    return found


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_it_speaks_as_the_composition(zoo: Zoo, exported: Export, architecture: str) -> None:
    base = zoo.base(architecture)
    terms = [(zoo.adapter(architecture, seed=1), 0.7), (zoo.adapter(architecture, seed=2, r=3, use_rslora=True), -1.2)]
    spec = " ".join(f"{path}:{weight}" for path, weight in terms)
    done = exported(spec, "merged", architecture, dtype=torch.float32)
    assert_close(logits(done.path), zoo.runtime(architecture).logits(IDS, compositions=spec), **EXACT)
    assert_close(logits(done.path), dense_logits(base, terms, IDS), **EXACT)
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (base, done.path))
    assert (after.chat_template, after("abc").input_ids) == (before.chat_template, before("abc").input_ids)
    assert (done.path / "generation_config.json").exists()
    assert "weight 0.7" in (done.path / "README.md").read_text()


def test_biases_go_where_the_base_has_some(zoo: Zoo, exported: Export) -> None:
    terms = [(zoo.adapter("opt", seed=4, lora_bias=True), 0.5)]
    done = exported(f"{terms[0][0]}:0.5", "merged", "opt", dtype=torch.float32)
    assert_close(logits(done.path), dense_logits(zoo.base("opt"), terms, IDS), **EXACT)


def test_biases_without_a_place_are_refused_with_every_layer(exported: Export, pool: list[Path]) -> None:
    with pytest.raises(ExportError, match="at 3 layers where the base has none") as caught:
        exported(str(pool[5]), "merged")
    assert "lm_head" in caught.value.problems


def test_a_tied_head_is_untied_and_the_embedding_stays(zoo: Zoo, exported: Export) -> None:
    tied = {"tie_word_embeddings": True}
    base = zoo.base("llama", **tied)
    terms = [(zoo.adapter("llama", changes=tied, seed=8, targets=("lm_head", "q_proj")), 1.5)]
    done = exported(f"{terms[0][0]}:1.5", "merged", base=base, dtype=torch.float32)
    assert_close(logits(done.path), dense_logits(base, terms, IDS), **EXACT)
    embeddings = [AutoModelForCausalLM.from_pretrained(f).get_input_embeddings().weight for f in (base, done.path)]
    assert torch.equal(*embeddings)


def test_sums_are_rounded_once(zoo: Zoo, exported: Export, tmp_path: Path) -> None:
    """From a bfloat16 base to bfloat16: each weight is the float32 sum, rounded; nothing else changed."""
    half = tmp_path / "half"
    shutil.copytree(zoo.base("llama"), half)
    AutoModelForCausalLM.from_pretrained(half, dtype=torch.bfloat16).save_pretrained(half)
    adapter = zoo.adapter("llama", seed=1)
    done = exported(f"{adapter}:0.7", "merged", base=half)
    wanted = dense_model(half, [(adapter, 0.7)])
    found = AutoModelForCausalLM.from_pretrained(done.path, dtype="auto")
    assert found.dtype == torch.bfloat16
    for name, tensor in wanted.state_dict().items():
        equal = found.state_dict()[name] == tensor.bfloat16()
        assert equal.float().mean() > 0.999  # float32 sums in another order lie on the other side of a half, rarely
    plain = AutoModelForCausalLM.from_pretrained(half, dtype="auto").state_dict()
    same = {name for name, tensor in found.state_dict().items() if torch.equal(tensor, plain[name])}
    assert {name for name in plain if "self_attn" in name} == plain.keys() - same


def test_a_quantized_folder_is_refused(zoo: Zoo, exported: Export, tmp_path: Path) -> None:
    from lora_rt.core.base.prepare import prepare_base
    from lora_rt.core.base.source import parse_base

    kept = prepare_base(parse_base(str(zoo.base("llama"))), "int4").folder
    with pytest.raises(ExportError, match="is quantized, and merging needs dense weights"):
        exported(str(zoo.adapter("llama", seed=1)), "merged", base=kept)


def test_a_full_disk_is_found_before_anything_is_read(
    zoo: Zoo, exported: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ExportError, match=r"takes 0\.0 GB and .* has 0\.0 GB left"):
        exported(str(zoo.adapter("llama", seed=1)), "merged")
    assert list(tmp_path.glob("*export-*")) == []


def test_a_base_that_is_no_model_is_refused(zoo: Zoo, exported: Export, tmp_path: Path) -> None:
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(BaseError, match="can't be read"):
        exported(str(zoo.adapter("llama", seed=1)), "merged", base=tmp_path / "odd")
    assert AutoConfig.from_pretrained(zoo.base("llama")).model_type == "llama"
