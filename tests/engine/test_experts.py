"""Adapters of fused experts and routers, against PEFT with its tensors in memory; every row under its own."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import lora_rt
from lora_rt.core.engine.experts import find_parameters
from lora_rt.core.step.adapter import with_adapter
from lora_rt.core.step.settings import TrainSettings
from support.architectures.shrink import random_model, tiny_config
from support.tiny import save_tokenizer

EXACT = {"atol": 2e-3, "rtol": 0.0}
IDS = torch.arange(24).view(3, 8) + 8


def base(folder: Path, kind: str) -> Any:
    model = random_model(tiny_config(kind))
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])  # gpt_oss keeps its experts transposed, and gives them biases
def test_rows_under_adapters_of_experts_are_what_peft_gives_each(kind: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = base(tmp_path / "base", kind)
    config = LoraConfig(r=2, lora_alpha=6, target_modules=[], task_type="CAUSAL_LM")
    config.target_parameters = ["experts.gate_up_proj", "1.mlp.experts.down_proj"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = get_peft_model(model, config).eval()
        torch.manual_seed(1)
        for name, parameter in tuned.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, 0, 0.2)
        tuned.save_pretrained(tmp_path / "one")
    with torch.no_grad():
        wanted = tuned(input_ids=IDS).logits
        with tuned.disable_adapter():
            alone = tuned(input_ids=IDS).logits
    assert (wanted - alone).abs().max() > 0.1
    with lora_rt.Runtime.load(tmp_path / "base", precision="float32", device="cpu", project=tmp_path) as runtime:
        runtime.load_adapter(str(tmp_path / "one"), name="one")
        found = runtime.logits(IDS, compositions=["one:1", None, "one:1"])
    assert_close(found, torch.stack([wanted[0], alone[1], wanted[2]]), **EXACT)
    with pytest.raises(lora_rt.LoraRtError, match="a LoRA of experts or routers, which is not exported"):
        lora_rt.export(str(tmp_path / "one"), "peft", tmp_path / "out", base=str(tmp_path / "base"))


@pytest.mark.parametrize(
    ("kind", "leaf"), [("llama4_text", "experts.down_proj"), ("jetmoe", "mlp.input_linear.weight")]
)
def test_adapters_of_experts_that_run_otherwise_are_refused_by_name(kind: str, leaf: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = base(tmp_path / "base", kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = LoraConfig(r=2, target_modules=[], target_parameters=[leaf], task_type="CAUSAL_LM")
        get_peft_model(model, config).save_pretrained(tmp_path / "one")
    runtime = lora_rt.Runtime.load(tmp_path / "base", precision="float32", device="cpu", project=tmp_path)
    with runtime, pytest.raises(lora_rt.LoraRtError, match="target_parameters") as refusal:
        runtime.load_adapter(str(tmp_path / "one"), name="one")
    assert all("not composed on this base" in problem for problem in refusal.value.problems)
    assert "Merge it into its base" in str(refusal.value.next_step)


def test_experts_are_trained_by_their_role_and_without_dropout(caplog: pytest.LogCaptureFixture) -> None:
    model = random_model(tiny_config("mixtral"))
    fused = [name for name, one in find_parameters(model).items() if one.experts]
    settings = TrainSettings(register="x", mode="output-only", data=Path("x.jsonl"), target_modules=("experts",))
    made = with_adapter(model, settings)
    assert sorted(made.base_model.targeted_parameter_names) == sorted(fused)
    assert made.peft_config["default"].lora_dropout == 0.0
    assert "dropout" in caplog.text


@pytest.mark.slow
def test_memory_is_estimated_with_adapters_of_experts(tmp_path: Path) -> None:
    from lora_rt.core.memory.inference import plan_inference

    model = base(tmp_path, "mixtral")
    settings = TrainSettings(register="x", mode="output-only", data=Path("x.jsonl"), target_modules=("experts",), r=2)
    found = plan_inference(model.config, "float32", "cpu", settings, adapters=2, rows=2, tokens=6)
    sizes = [p.experts * (p.out_features + p.in_features) for p in find_parameters(model).values() if p.experts]
    assert found.adapters == 2 * 2 * 4 * sum(sizes)


def test_a_target_parameter_that_is_none_is_named(tmp_path: Path) -> None:
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [], "target_parameters": "all"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    from lora_rt.registry.inspection.config import read_config

    _, problems = read_config(json.dumps(config).encode())
    assert any("target_parameters is 'all', not a list of names" in problem for problem in problems)


def test_a_file_of_single_experts_is_read_as_the_fused_ones(tmp_path: Path) -> None:
    """As Mixtral's were written before its experts were fused: one layer per expert, and the router as one."""
    from safetensors.torch import save_file

    model = base(tmp_path / "base", "mixtral")
    torch.manual_seed(2)
    tensors: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for number, block in enumerate(model.model.layers):
            where = f"base_model.model.model.layers.{number}.block_sparse_moe"
            fused = block.mlp.experts
            middle = fused.down_proj.shape[2]
            for expert in range(len(fused.down_proj)):
                rows = {"w1": slice(0, middle), "w3": slice(middle, 2 * middle)}
                for leaf, (out, width) in {"w1": (middle, 64), "w3": (middle, 64), "w2": (64, middle)}.items():
                    a, b = torch.randn(2, width) * 0.2, torch.randn(out, 2) * 0.2
                    tensors[f"{where}.experts.{expert}.{leaf}.lora_A.weight"] = a
                    tensors[f"{where}.experts.{expert}.{leaf}.lora_B.weight"] = b
                    if leaf == "w2":
                        fused.down_proj[expert] += 3 * b @ a
                    else:
                        fused.gate_up_proj[expert, rows[leaf]] += 3 * b @ a
            a, b = torch.randn(2, 64) * 0.2, torch.randn(len(fused.down_proj), 2) * 0.2
            tensors |= {f"{where}.gate.lora_A.weight": a, f"{where}.gate.lora_B.weight": b}
            block.mlp.gate.weight += 3 * b @ a
        wanted = model(input_ids=IDS).logits
    (tmp_path / "old").mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 6, "target_modules": ["w1", "w2", "w3", "gate"]}
    (tmp_path / "old/adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "old/adapter_model.safetensors", {"format": "pt"})
    with lora_rt.Runtime.load(tmp_path / "base", precision="float32", device="cpu", project=tmp_path) as runtime:
        runtime.load_adapter(str(tmp_path / "old"), name="old")
        assert_close(runtime.logits(IDS, compositions="old"), wanted, **EXACT)
