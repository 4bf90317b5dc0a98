"""Bases that nobody should wait for: each is refused in one line, before anything is built from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_rt.core.base.load import load_base
from lora_rt.core.base.reading import config_alone
from lora_rt.core.base.source import BaseError, parse_base
from lora_rt.core.generation.prompts import TextFormat
from support.tiny import Zoo


@pytest.fixture
def broken(zoo: Zoo, tmp_path: Path) -> Path:
    """A copy of a good folder, to be broken."""
    return Path(shutil.copytree(zoo.base("llama"), tmp_path / "broken"))


def configure(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def refused(folder: Path, precision: str = "float32") -> BaseError:
    with pytest.raises(BaseError) as caught:
        load_base(str(folder), precision, "cpu")
    assert "\n" not in caught.value.message
    assert caught.value.next_step
    return caught.value


@pytest.mark.parametrize("precision", ["float32", "int4"])
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"quantization_config": "awq"}, "quantization_config is 'awq'"),
        ({"quantization_config": [1, 2]}, "quantization_config is [1, 2]"),
        ({"num_hidden_layers": "x"}, "num_hidden_layers is 'x'"),
        ({"num_hidden_layers": 1_000_000}, "num_hidden_layers is 1,000,000"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0, and can be at most 2,000 and not less than 1"),
        ({"max_position_embeddings": -1}, "and not less than 0"),
        ({"hidden_size": 1e6}, "hidden_size is 1000000.0"),
        ({"vocab_size": 10**40}, "vocab_size is 1000"),
        ({"num_attention_heads": True}, "num_attention_heads is True"),
        ({"text_config": "none"}, "text_config is 'none'"),
        ({"hidden_size": 1 << 19, "vocab_size": 1 << 20}, "1,048,576 words"),
        ({"num_hidden_layers": 1999, "hidden_size": 1 << 16}, "1,999 layers"),
    ],
)
def test_numbers_that_no_model_has_are_named(broken: Path, precision: str, changes: dict[str, Any], named: str) -> None:
    configure(broken, **changes)
    assert any(named in problem for problem in refused(broken, precision).problems)


@pytest.mark.parametrize("changes", [{"num_hidden_layers": "x"}, {"num_hidden_layers": 10**6}])
def test_whoever_reads_the_configuration_alone_refuses_it_too(broken: Path, changes: dict[str, Any]) -> None:
    configure(broken, **changes)
    with pytest.raises(BaseError, match="does not describe a model"):
        config_alone(parse_base(str(broken)))


def test_what_a_configuration_leaves_out_is_not_made_up_in_gigabytes(broken: Path) -> None:
    (broken / "config.json").write_text('{"model_type": "llama"}')
    assert "more weights than there are" in refused(broken).message


@pytest.mark.parametrize("depth", [5_000, 100_000])
def test_json_nested_deep_is_refused(broken: Path, depth: int) -> None:
    config = (broken / "config.json").read_text().rstrip().removesuffix("}")
    (broken / "config.json").write_text(config + ', "a": ' + "[" * depth + "]" * depth + "}")
    assert "config" in refused(broken).message


def test_a_pickle_is_never_opened(broken: Path) -> None:
    (broken / "model.safetensors").unlink()
    (broken / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")
    error = refused(broken)
    assert "pickle" in error.message
    assert "safetensors" in error.next_step


@pytest.mark.parametrize("index", ['{"weight_map": {"a": "../outside.safetensors"}}', '{"weight_map": [1]}', "[", "{}"])
def test_an_index_that_leads_elsewhere_is_refused(broken: Path, index: str) -> None:
    (broken / "model.safetensors").unlink()
    (broken / "model.safetensors.index.json").write_text(index)
    assert "index" in refused(broken).message


def template(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "chat_template.jinja").write_text(text)

    return write


def pattern(folder: Path) -> None:
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    split = {"type": "Split", "pattern": {"Regex": r"(\w+\s?)*$"}, "behavior": "Isolated", "invert": False}
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, tokenizer["pre_tokenizer"]]}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


LOOP = "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}" * 1
LOOPS = {
    "it loops": template(LOOP + "{% endfor %}{% endfor %}"),
    "it is long": template("{% for i in range(99999) %}{{ 'a' * 20000 }}{% endfor %}"),
    "it is huge": template("{{ 'a' * 2000000000 }}"),
    "it takes all memory": template("{{ 'a' * 20000000000 }}"),
    "its pattern blows up": pattern,
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", LOOPS.values(), ids=LOOPS)
def test_a_template_or_a_pattern_without_an_end_is_refused(broken: Path, damage: Callable[[Path], None]) -> None:
    damage(broken)
    message = refused(broken).message
    assert "template" in message or "tokenizer" in message


def test_a_template_that_was_held_to_the_limits_once_is_not_tried_again(
    broken: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (broken / "chat_template.jinja").write_text("{% for i in range(2) %}{{ messages[0].content }}{% endfor %}")
    load_base(str(broken), "float32", "cpu")
    monkeypatch.setattr("lora_rt.core.base.bounded._passed", set())  # as in another process
    monkeypatch.setattr("subprocess.run", None)
    TextFormat.of_base(load_base(str(broken), "float32", "cpu"))


@pytest.mark.parametrize("changes", [{"rms_norm_eps": "x"}, {"eos_token_id": "x"}, {"rope_parameters": "x"}])
def test_a_field_of_another_type_is_named(broken: Path, changes: dict[str, Any]) -> None:
    configure(broken, **changes)
    assert "can't be loaded" in refused(broken).message


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


@pytest.mark.parametrize("precision", ["float32", "int4"])
@pytest.mark.parametrize(
    ("key", "step"),
    [
        ("model.layers.0.self_attn.q_proj.bias", "Fetch the whole model again"),
        ("model.layers.0.self_attn.q_proj.lora_A.default.weight", "Merge the adapter"),
    ],
)
def test_weights_that_a_layer_would_be_computed_without_are_named(
    broken: Path, precision: str, key: str, step: str
) -> None:
    """transformers passes over them, and what is loaded is not the model that was saved."""
    rewrite(broken, lambda tensors: {**tensors, key: torch.ones(64)})
    error = refused(broken, precision)
    assert error.problems == (key,)
    assert "belong to layers that have no such weights" in error.message
    assert error.next_step.startswith(step)


def test_an_adapter_that_was_saved_with_its_base_is_said_to_be_one(broken: Path) -> None:
    name = "model.layers.0.self_attn.q_proj"
    rewrite(broken, lambda t: {k.replace(f"{name}.", f"{name}.base_layer."): v for k, v in t.items()})
    assert "Merge the adapter" in refused(broken).next_step


def test_weights_that_are_of_no_layer_are_said_and_left_alone(broken: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(broken, lambda tensors: {**tensors, "model.layers.9.eh_proj.weight": torch.ones(4, 4)})
    load_base(str(broken), "float32", "cpu")
    (record,) = caplog.records
    assert record.getMessage().startswith("nothing reads these weights of ")
    assert record.getMessage().endswith(": model.layers.9.eh_proj.weight")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "generation_config.json"])
def test_a_pointer_of_git_lfs_is_told_from_a_damaged_file(broken: Path, name: str) -> None:
    (broken / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 269060552\n")
    error = refused(broken)
    assert (error.problems, error.next_step) == ((name,), "Run in that folder: git lfs pull")


def test_a_folder_without_a_tokenizer_is_told_so(broken: Path) -> None:
    for file in [*broken.glob("tokenizer*"), *broken.glob("vocab*")]:
        file.unlink()
    error = refused(broken)
    assert "has no files of a tokenizer" in error.message
    assert "tokenizer.json" in error.next_step


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_an_attention_that_is_not_installed_here_is_not_asked_for(broken: Path, key: str) -> None:
    configure(broken, **{key: "flash_attention_2"})
    assert load_base(str(broken), "float32", "cpu").model.config._attn_implementation == "sdpa"
