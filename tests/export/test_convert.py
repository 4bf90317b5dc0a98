"""Adapters that take their first factors out of the base by data: what they learned is told from how they began."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_rt.core.export import ExportError
from lora_rt.core.export.convert import convert
from lora_rt.registry.errors import StorageError
from support.tiny import Zoo, some_ids

IDS = some_ids(rows=2)


def begun(kind: str, model: Any) -> Any:
    """PEFT's model as each method begins it."""
    from peft import LoraConfig, get_peft_model

    options: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    if kind == "corda":
        from peft.tuners.lora.config import CordaConfig
        from peft.tuners.lora.corda import preprocess_corda

        settings = LoraConfig(**options, init_lora_weights="corda", corda_config=CordaConfig(corda_method="kpm"))
        preprocess_corda(model, settings, run_model=lambda: model(input_ids=some_ids(tokens=200, seed=2)))
    elif kind == "lora_ga":
        from peft.tuners.lora.config import LoraGAConfig
        from peft.tuners.lora.loraga import preprocess_loraga

        settings = LoraConfig(**options, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())

        def step() -> None:
            ids = some_ids(rows=4, seed=2)
            model(input_ids=ids, labels=ids).loss.backward()

        preprocess_loraga(model, settings, step)
    else:
        settings = LoraConfig(**options, init_lora_weights=kind)
    return get_peft_model(model, settings).eval()


@pytest.mark.parametrize("kind", ["corda", "lora_ga", "pissa", "pissa_niter_4", "olora"])
def test_what_it_began_with_is_taken_off_by_the_adapter_saved_before_training(
    kind: str, zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    if find_spec("attr") is None:  # of which PEFT takes `dataclass` alone, for CorDA, and does not depend on it
        monkeypatch.setitem(sys.modules, "attr", SimpleNamespace(dataclass=dataclass))

    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(zoo.base("llama"), dtype=torch.float32)
        adapted = begun(kind, model)
        adapted.save_pretrained(tmp_path / "before")
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
        adapted.save_pretrained(tmp_path / "after")
    with torch.inference_mode():
        wanted: Tensor = adapted(input_ids=IDS).logits
    convert(tmp_path / "after", tmp_path / "plain", initial=tmp_path / "before")
    runtime = zoo.runtime("llama")
    name = runtime.load_adapter(str(tmp_path / "plain"), f"plain-{kind.replace('_', '-')}")
    found = runtime.logits(IDS, compositions=name)
    runtime.unload_adapter(name)
    assert (wanted - runtime.logits(IDS)).abs().max() > 0.05
    torch.testing.assert_close(found, wanted, atol=3e-4, rtol=0)


def test_another_adapter_is_not_taken_for_how_it_began(zoo: Zoo, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    for name, targets in (("after", ["q_proj", "v_proj"]), ("other", ["down_proj"])):
        from peft import LoraConfig, get_peft_model

        model = AutoModelForCausalLM.from_pretrained(zoo.base("llama"), dtype=torch.float32)
        get_peft_model(model, LoraConfig(r=2, target_modules=targets, init_lora_weights="olora")).save_pretrained(
            tmp_path / name
        )
    with pytest.raises(ExportError, match="not of the same layers"):
        convert(tmp_path / "after", tmp_path / "plain", initial=tmp_path / "other")
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("no weights before", "can't be read"),
        ("no rank", "r is 'eight'"),
        ("a part cut off", "can't be read"),
    ],
)
def test_what_can_t_be_read_is_refused_and_nothing_is_left(damage: str, told: str, zoo: Zoo, tmp_path: Path) -> None:
    source, before = tmp_path / "after", tmp_path / "before"
    for folder in (source, before):
        shutil.copytree(zoo.adapter("llama", seed=1), folder)
    config = json.loads((source / "adapter_config.json").read_text()) | {"init_lora_weights": "pissa"}
    if damage == "no weights before":
        (before / "adapter_model.safetensors").unlink()
    if damage == "no rank":
        config["r"] = "eight"
    if damage == "a part cut off":
        (source / "adapter_model.safetensors").rename(source / "adapter_model-00001-of-00001.safetensors")
        os.truncate(source / "adapter_model-00001-of-00001.safetensors", 500)
    (source / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError) as caught:
        convert(source, tmp_path / "plain", initial=before)
    assert told in " ".join([caught.value.message, *caught.value.problems])
    assert caught.value.next_step
    assert not (tmp_path / "plain").exists()


def test_what_the_disk_has_no_room_for_leaves_nothing(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: Path, target: Path) -> None:
        if out in target.parents and any(target.parent.iterdir()):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(target))
        copyfile(file, target)

    source, out, copyfile = tmp_path / "after", tmp_path / "plain", shutil.copyfile
    shutil.copytree(zoo.adapter("llama", seed=1), source)
    (source / "adapter_model.safetensors").rename(source / "adapter_model-00001-of-00001.safetensors")
    out.mkdir()
    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(StorageError, match="can't be written"):
        convert(source, out)
    assert list(out.iterdir()) == []


def test_a_configuration_without_a_rank_has_peft_s_own(zoo: Zoo, tmp_path: Path) -> None:
    source = tmp_path / "after"
    shutil.copytree(zoo.adapter("llama", seed=1, r=8, lora_alpha=8), source)
    config = json.loads((source / "adapter_config.json").read_text()) | {"init_lora_weights": "olora"}
    del config["r"], config["lora_alpha"]
    (source / "adapter_config.json").write_text(json.dumps(config))
    convert(source, tmp_path / "plain", initial=zoo.adapter("llama", seed=2, r=8, lora_alpha=8))
    made = json.loads((tmp_path / "plain/adapter_config.json").read_text())
    assert (made["r"], made["lora_alpha"]) == (16, 16)
