"""What lies beside a base, and what the process was set to, stays out of it."""

from __future__ import annotations

import logging
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_rt.core.base.load import load_base
from support.tiny import Zoo, dense_logits, some_ids


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "int4"])
def test_an_adapter_beside_a_model_is_left_alone_and_said(
    zoo: Zoo, tmp_path: Path, caplog: pytest.LogCaptureFixture, precision: str
) -> None:
    folder = Path(shutil.copytree(zoo.base("llama"), tmp_path / "model"))
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(zoo.adapter("llama") / name, folder / name)
    with caplog.at_level(logging.WARNING, "lora_rt.base"):
        base = load_base(str(folder), precision, "cpu")
        plain = load_base(str(zoo.base("llama")), precision, "cpu")
    assert f"lora-rt compose {folder} --base {folder}" in caplog.text
    assert base.identity.digest == plain.identity.digest
    if precision == "int4":
        assert "model.embed_tokens.weight" in load_file(base.folder / "model.safetensors")
        return
    with torch.inference_mode():
        found = base.model(input_ids=some_ids()).logits
    assert torch.equal(found, dense_logits(zoo.base("llama"), [], some_ids()))


@pytest.mark.slow  # in the quick tests torch has left libraries out, which set filters of their own when they come
def test_an_application_keeps_its_own_settings_of_the_libraries(zoo: Zoo) -> None:
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging as upstream

    def settings() -> list[object]:
        adviser = logging.getLogger("bitsandbytes.backends.cpu.ops")
        bar = modeling_gguf_pytorch_utils.tqdm
        return [upstream.get_verbosity(), upstream.is_progress_bar_enabled(), bar, list(adviser.filters)]

    upstream.set_verbosity_info()
    before, filters = settings(), list(warnings.filters)
    zoo.runtime("llama", "int8", fresh=True)
    assert (settings(), list(warnings.filters)) == (before, filters)
    upstream.set_verbosity_warning()
