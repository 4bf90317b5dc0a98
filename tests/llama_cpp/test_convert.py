"""A dense base is converted once, and says what it says in the other engine."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_rt.core.base.source import BaseError
from lora_rt.core.llama_cpp.runtime import LlamaRuntime
from lora_rt.plugins.manager import load_modes
from lora_rt.registry.registry import Registry
from support.tiny import Zoo

pytest.importorskip("xllamacpp")


def load(base: Path, precision: str) -> LlamaRuntime:
    return LlamaRuntime.load(str(base), registry=Registry(), modes=load_modes(), precision=precision, device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [False, True])
def test_in_float32_it_says_what_the_other_engine_says(zoo: Zoo, architecture: str, tied: bool) -> None:
    changes = {"tie_word_embeddings": tied, **({"sliding_window": None} if architecture == "mistral" else {})}
    llama = load(zoo.base(architecture, **changes), "float32")
    adapter = str(zoo.adapter(architecture, seed=1, changes=changes))
    compositions = [None, adapter, f"{adapter}:-0.7"]
    asked = {"max_new_tokens": 12, "repetition_penalty": 1.3}
    told = zoo.runtime(architecture, **changes).generate(["ab"] * 3, compositions, deterministic=True, **asked)
    assert llama.generate(["ab"] * 3, compositions, **asked) == told
    assert len(set(told)) > 1
    llama.close()


@pytest.mark.parametrize(("precision", "kind"), [("int4", "Q4_1"), ("int8", "Q8_0"), ("bfloat16", "BF16")])
def test_a_precision_is_the_kind_of_its_matrices(zoo: Zoo, precision: str, kind: str) -> None:
    import gguf

    llama = load(zoo.base("llama"), precision)
    assert llama.base.precision == kind
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(llama.file).tensors}
    assert (kinds["blk.0.attn_q.weight"], kinds["blk.0.attn_norm.weight"]) == (kind, "F32")
    assert kinds["output.weight"] == ("Q8_0" if precision == "int4" else kind)
    written = llama.file.stat().st_mtime_ns
    assert load(zoo.base("llama"), precision).file.stat().st_mtime_ns == written
    assert len(llama.generate(["ab"], max_new_tokens=4)) == 1
    llama.close()


@pytest.mark.parametrize(
    ("architecture", "changes", "said"),
    [
        ("gpt2", {}, "it is a gpt2"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            "not the plain rotary",
        ),
        ("mistral", {"sliding_window": 8}, "a limited way"),
    ],
)
def test_what_would_be_written_wrong_is_refused(zoo: Zoo, architecture: str, changes: dict, said: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(BaseError, match=said) as caught:
        load(zoo.base(architecture, **changes), "int8")
    assert "--engine torch" in caught.value.next_step
