"""What `--base` means, and one line for what it can't mean."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from lora_rt.core.base import reading
from lora_rt.core.base.identity import identify_folder
from lora_rt.core.base.precision import check_precision, choose_device
from lora_rt.core.base.reading import whole_tokenizer
from lora_rt.core.base.source import BaseError, parse_base
from lora_rt.core.runtime import Runtime
from lora_rt.errors import LoraRtError, UsageError
from support.tiny import Zoo


def test_each_form_of_a_base_is_recognised(tmp_path: Path, zoo: Zoo) -> None:
    gguf = tmp_path / "small.gguf"
    gguf.write_bytes(b"GGUF")
    assert parse_base("default").kind == "default"
    assert parse_base(str(zoo.base("llama"))).kind == "folder"
    assert parse_base(str(gguf)).kind == "gguf"
    hub = parse_base("Qwen/Qwen2.5-7B-Instruct@main")
    assert (hub.kind, hub.text, hub.revision) == ("hub", "Qwen/Qwen2.5-7B-Instruct", "main")
    assert parse_base("gpt2").revision is None


@pytest.mark.parametrize(
    "text",
    [
        "./nowhere",
        "/nowhere/at/all",
        "nowhere.gguf",
        "~/nowhere-at-all",
        "a/b/c",
        "",
        "a b",
        "gpt2@",
        "../x",
        "~nobody-here/x",
        "./" + "a" * 5000,
        "./a\0b",
    ],
)
def test_what_is_no_base_is_refused_with_a_next_step(text: str) -> None:
    with pytest.raises((BaseError, UsageError)) as caught:
        parse_base(text)
    assert caught.value.next_step
    assert "\n" not in caught.value.message


def test_a_file_that_is_no_gguf_and_a_folder_without_a_model_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(BaseError, match="not a GGUF file"):
        parse_base(str(tmp_path / "model.bin"))
    with pytest.raises(BaseError, match=r"no config\.json"):
        parse_base(str(tmp_path))
    (tmp_path / "model.gguf").write_bytes(b"x")
    with pytest.raises(BaseError) as caught:
        parse_base(str(tmp_path))
    assert "model.gguf" in caught.value.next_step


def test_a_copy_is_the_same_base_and_other_weights_are_another(tmp_path: Path, zoo: Zoo) -> None:
    source = zoo.base("llama")
    copy = shutil.copytree(source, tmp_path / "copy")
    assert identify_folder(copy).digest == identify_folder(source).digest
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert identify_folder(copy).digest != identify_folder(source).digest


@pytest.mark.parametrize("name", ["int3", "", "fp32", "INT4"])
def test_a_precision_that_does_not_exist_is_refused_with_those_that_do(name: str, zoo: Zoo) -> None:
    with pytest.raises(UsageError) as caught:
        Runtime.load(str(zoo.base("llama")), precision=name)
    assert "float32, bfloat16, float16, int8, int4" in caught.value.next_step


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99", "cuda", "mps", "cpu:x", ""])
def test_a_device_that_is_not_here_is_refused(device: str, zoo: Zoo) -> None:
    import torch

    if torch.cuda.is_available() and device == "cuda":
        assert choose_device(device, check_precision("float32")).type == "cuda"
        return
    with pytest.raises(LoraRtError) as caught:
        Runtime.load(str(zoo.base("llama")), precision="float32", device=device)
    assert caught.value.next_step


def test_a_tokenizer_that_needs_another_package_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x0e\n\x00")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    monkeypatch.setattr(reading, "find_spec", lambda name: None)
    with pytest.raises(BaseError) as caught:
        whole_tokenizer(tmp_path)
    assert "pip install sentencepiece tiktoken" in str(caught.value.next_step)
