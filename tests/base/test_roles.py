"""Targets by name, path, role and pattern mean the same layers everywhere."""

from __future__ import annotations

import pytest

from lora_rt.core.base.roles import TargetError, as_peft_takes_them, resolved, roles_of

MISTRAL = [
    f"model.layers.{n}.{part}"
    for n in range(2)
    for part in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )
]  # fmt: skip
GPT2 = [f"transformer.h.0.{part}" for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")]


@pytest.mark.parametrize(
    ("name", "roles"),
    [
        ("transformer.h.0.attn.c_attn", ("query", "key", "value")),
        ("transformer.h.0.attn.c_proj", ("output",)),
        ("transformer.h.0.mlp.c_proj", ("down",)),
        ("gpt_neox.layers.0.attention.dense", ("output",)),
        ("gpt_neox.layers.0.mlp.dense_4h_to_h", ("down",)),
        ("model.layers.0.self_attn.qkv_proj", ("query", "key", "value")),
        ("model.layers.0.mlp.gate_up_proj", ("gate", "up")),
        ("model.layers.0.self_attn.kv_b_proj", ("key", "value")),
        ("model.decoder.layers.0.self_attn.out_proj", ("output",)),
        ("model.decoder.layers.0.fc1", ("up",)),
        ("bert.encoder.layer.0.attention.self.query", ("query",)),
        ("bert.encoder.layer.0.attention.output.dense", ("output",)),
        ("bert.encoder.layer.0.intermediate.dense", ("up",)),
        ("bert.encoder.layer.0.output.dense", ("down",)),
        ("model.layers.0.mlp.experts.gate_up_proj", ("experts",)),
        ("model.layers.0.block_sparse_moe.experts.3.w1", ("experts",)),
        ("backbone.layers.0.mixer.in_proj", ()),
    ],
)
def test_a_layer_has_its_roles(name: str, roles: tuple[str, ...]) -> None:
    assert roles_of(name) == roles


def test_roles_names_paths_and_patterns_are_resolved_to_paths() -> None:
    attention = [name for name in MISTRAL if "self_attn" in name]
    assert resolved(["attention"], MISTRAL) == attention
    assert resolved(["query", "key", "value", "output"], MISTRAL) == attention
    assert resolved(["q_proj", "k_proj", "v_proj", "o_proj"], MISTRAL) == attention
    assert resolved([r"model\.layers\.\d+\.self_attn\..*"], MISTRAL) == attention
    assert resolved(["mlp"], MISTRAL) == [name for name in MISTRAL if ".mlp." in name]
    assert resolved(["layers.1.self_attn.q_proj"], MISTRAL) == ["model.layers.1.self_attn.q_proj"]
    assert resolved(["all-linear"], MISTRAL) == MISTRAL
    assert resolved(["attention"], GPT2) == GPT2[:2]
    assert resolved(["down"], GPT2) == GPT2[3:]


def test_what_is_not_there_is_named_with_the_nearest_name_and_the_role() -> None:
    with pytest.raises(TargetError) as caught:
        resolved(["k_proj", "out_proj", "v_prj"], MISTRAL)
    assert "no layer is called 'out_proj'; the nearest is 'o_proj', of the role 'output'" in str(caught.value)
    assert "no layer is called 'v_prj'; the nearest is 'v_proj'" in str(caught.value)
    with pytest.raises(TargetError, match="no layers of the role 'gate'; it has: attention, mlp"):
        resolved(["gate"], GPT2)
    with pytest.raises(TargetError, match="matches no layer's path"):
        resolved([r".*\.nothing"], GPT2)


def test_peft_gets_short_names_only_where_they_mean_the_same() -> None:
    assert as_peft_takes_them(resolved(["attention"], MISTRAL), MISTRAL) == ["k_proj", "o_proj", "q_proj", "v_proj"]
    assert as_peft_takes_them(resolved(["output"], GPT2), GPT2) == ["transformer.h.0.attn.c_proj"]
    assert as_peft_takes_them(["model.mixer.0"], ["model.mixer.0"]) == ["model.mixer.0"]
