"""A base is quantized once and kept; nothing broken, half-written or incomplete is ever used."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from lora_rt.core.base import load as load_module
from lora_rt.core.base import prepare
from lora_rt.core.base.load import load_base
from lora_rt.core.base.source import BaseError, parse_base
from lora_rt.registry import home
from support.architectures.shrink import random_model as random_of_type
from support.architectures.shrink import tiny_config
from support.tiny import Zoo, config_of, dense_logits, random_model, save_tokenizer, some_ids

pytestmark = pytest.mark.slow

PRECISIONS = ("float32", "bfloat16", "float16", "int8", "int4")
IDS = some_ids()


def forked(action: Callable[[], object]) -> int:
    """A process that does this and ends with 0, or with 1 where it fails; its number."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    return child


def kept(zoo: Zoo, precision: str = "int4") -> Path:
    return prepare.prepare_base(parse_base(str(zoo.base("llama"))), precision).folder  # type: ignore[arg-type]


def logits(text: str, precision: str) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = load_base(text, precision, "cpu").model(input_ids=IDS).logits
    return found.float()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_precision_loads_and_is_near_the_dense_model(zoo: Zoo, precision: str) -> None:
    base = load_base(str(zoo.base("llama")), precision, "cpu")
    assert (base.precision, base.facts.precision, base.dtype) == (precision, precision, base.model.dtype)
    assert not base.model.training
    assert not any(parameter.requires_grad for parameter in base.model.parameters())
    wanted = dense_logits(zoo.base("llama"), [], IDS)
    found = logits(str(zoo.base("llama")), precision)
    slack = {"float32": 1e-6, "bfloat16": 0.03, "float16": 0.005, "int8": 0.05, "int4": 0.35}[precision]
    assert (found - wanted).norm() < slack * wanted.norm()


def test_a_quantized_base_is_made_once_and_then_read(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    first = logits(str(zoo.base("llama")), "int4")
    monkeypatch.setattr(prepare, "_quantize", None)
    assert torch.equal(logits(str(zoo.base("llama")), "int4"), first)


def test_what_was_quantized_is_gone_when_it_is_kept(zoo: Zoo) -> None:
    """On a GPU it would lie there beside the base that is loaded, and a 4-bit layer and its weight hold each other."""

    def layers() -> set[int]:
        found = gc.get_objects()
        return {id(thing) for thing in found if type(thing).__name__ == "Linear4bit"}

    gc.collect()
    before = layers()
    gc.disable()
    try:
        loaded = load_base(str(zoo.base("llama")), "int4", "cpu")
        assert layers() - before <= {id(module) for module in loaded.model.modules()}
    finally:
        gc.enable()


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_dense_folder_is_read_where_it_lies(zoo: Zoo, precision: str) -> None:
    assert kept(zoo, precision) == zoo.base("llama").resolve()
    assert not home.bases().exists()


def cut(folder: Path) -> None:
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)


def lose_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def lose_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def unsay(folder: Path) -> None:
    (folder / prepare.MANIFEST).unlink()


def garble(folder: Path) -> None:
    (folder / prepare.MANIFEST).write_text("[1, 2]")


@pytest.mark.parametrize("damage", [cut, lose_weights, lose_tokenizer, unsay, garble])
def test_a_kept_base_that_is_not_whole_is_made_again(zoo: Zoo, damage: Callable[[Path], None]) -> None:
    first = logits(str(zoo.base("llama")), "int4")
    damage(kept(zoo))
    assert torch.equal(logits(str(zoo.base("llama")), "int4"), first)


def test_what_a_killed_build_left_is_not_used_and_is_swept_away(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real build in a process of its own, killed while it writes."""
    base = zoo.base("llama")
    written, writes = os.pipe()

    def build() -> None:
        def never(folder: Path, identity: object) -> None:
            os.write(writes, b"!")
            time.sleep(600)

        monkeypatch.setattr(prepare, "_write_manifest", never)
        prepare.prepare_base(parse_base(str(base)), "int4")

    child = forked(build)
    os.close(writes)
    assert os.read(written, 1) == b"!"
    os.close(written)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    (family,) = home.bases().iterdir()
    (left,) = family.glob(".*int4/")
    assert (left / "model.safetensors").exists()
    assert not (family / "int4").exists()
    assert logits(str(zoo.base("llama")), "int4").isfinite().all()
    assert sorted(path.name for path in family.iterdir()) == [".int4.lock", "int4"]


def test_a_failing_build_leaves_nothing(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(dense: Path, folder: Path, precision: str) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise BaseError("no")

    monkeypatch.setattr(prepare, "_quantize", fail)
    with pytest.raises(BaseError, match="no"):
        kept(zoo)
    (family,) = home.bases().iterdir()
    assert [path.name for path in family.iterdir()] == [".int4.lock"]


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, "No space left on device"), None],
    ids=["the system's words", "safetensors' words"],
)
def test_a_full_disk_is_explained(zoo: Zoo, monkeypatch: pytest.MonkeyPatch, failure: Exception | None) -> None:
    from safetensors import SafetensorError

    def full(dense: Path, folder: Path, precision: str) -> None:
        raise failure or SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(prepare, "_quantize", full)
    with pytest.raises(BaseError, match="no room on the disk") as caught:
        kept(zoo)
    assert caught.value.next_step


def test_two_processes_that_need_one_base_make_it_once(
    zoo: Zoo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, told, own = str(zoo.base("llama")), tmp_path / "told", prepare._build

    def build(*given: Any) -> None:
        with told.open("a") as file:
            file.write("built\n")
        own(*given)

    def load() -> None:
        monkeypatch.setattr(prepare, "_build", build)
        load_base(base, "int8", "cpu")

    both = [forked(load) for _ in range(2)]
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in both] == [0, 0]
    assert told.read_text() == "built\n"


@pytest.fixture
def broken(zoo: Zoo, tmp_path: Path) -> Path:
    """A copy of a good folder, to be broken."""
    return Path(shutil.copytree(zoo.base("llama"), tmp_path / "broken"))


def scribble(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def drop_a_tensor(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def widen(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))


def ask_for_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "unheard-of",
        "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text("raise SystemExit('code of a model was run')\n")


@pytest.mark.parametrize("precision", ["float32", "int4"])
@pytest.mark.parametrize(
    "damage",
    [
        cut,
        lose_weights,
        lose_tokenizer,
        drop_a_tensor,
        widen,
        ask_for_code,
        scribble("config.json", "{"),
        scribble("config.json", "[]"),
        scribble("config.json", "{}"),
        scribble("config.json", '{"model_type": "t5"}'),
        scribble("tokenizer.json", "{"),
        scribble("model.safetensors", "no weights"),
    ],
    ids=[
        "cut",
        "no weights",
        "no tokenizer",
        "a tensor missing",
        "other shapes",
        "code of its own",
        "no JSON",
        "a list",
        "an empty config",
        "no causal model",
        "a broken tokenizer",
        "text for weights",
    ],
)
def test_a_broken_folder_is_refused_in_a_line(broken: Path, damage: Callable[[Path], None], precision: str) -> None:
    damage(broken)
    with pytest.raises(BaseError) as caught:
        load_base(str(broken), precision, "cpu")
    assert caught.value.next_step
    assert "\n" not in caught.value.message
    assert not list(home.bases().rglob("*.safetensors"))


def test_a_quantized_folder_is_used_as_it_is_and_at_no_other_precision(zoo: Zoo, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(kept(zoo), tmp_path / "ready"))
    assert_close(logits(str(folder), "int4"), logits(str(zoo.base("llama")), "int4"), atol=0, rtol=0)
    for precision in ("float32", "int8"):
        with pytest.raises(BaseError, match="already quantized to int4") as caught:
            load_base(str(folder), precision, "cpu")
        assert "--precision int4" in caught.value.next_step


def test_layers_whose_sizes_the_cpu_kernel_does_not_allow_for_are_computed_all_the_same(zoo: Zoo) -> None:
    uneven = zoo.base("llama", intermediate_size=72, hidden_size=80, head_dim=12)
    assert logits(str(uneven), "int4").isfinite().all()


def test_a_base_without_padding_and_end_tokens_generates(zoo: Zoo, tmp_path: Path) -> None:
    from lora_rt.core.runtime import Runtime

    folder = Path(shutil.copytree(zoo.base("llama"), tmp_path / "bare"))
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        for key in ("pad_token", "eos_token", "pad_token_id", "eos_token_id", "bos_token_id"):
            content.pop(key, None)
        (folder / name).write_text(json.dumps(content))
    runtime = Runtime.load(str(folder), precision="float32", device="cpu", project=tmp_path)
    together = runtime.generate(["a", "a longer one"], max_new_tokens=5, repetition_penalty=1.5)
    assert together == [
        runtime.generate(prompt, max_new_tokens=5, repetition_penalty=1.5) for prompt in ("a", "a longer one")
    ]


def test_memory_that_does_not_suffice_is_explained(zoo: Zoo, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_given: object, **_named: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(load_module, "whole_model", refuse)
    with pytest.raises(BaseError, match="does not fit into the memory") as caught:
        load_base(str(zoo.base("llama")), "float32", "cpu")
    assert "int4" in caught.value.next_step


def test_training_goes_on_after_an_evaluation_over_int4(zoo: Zoo) -> None:
    """bitsandbytes would repack the weights at the first evaluation, for a kernel that gives no gradient."""
    from peft import LoraConfig, get_peft_model

    base = load_base(str(zoo.base("llama")), "int4", "cpu", for_training=True)
    with torch.inference_mode():
        base.model(input_ids=IDS)
    model = get_peft_model(base.model, LoraConfig(r=2, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"))
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    gradients = [p.grad for name, p in model.named_parameters() if "lora_B" in name]
    assert gradients
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in gradients)


def test_progress_is_silent_where_nobody_watches(zoo: Zoo, capfd: pytest.CaptureFixture[str]) -> None:
    load_base(str(zoo.base("llama")), "int8", "cpu")
    assert capfd.readouterr() == ("", "")


def ternary(folder: Path) -> Any:
    """A model in BitNet's packed ternary weights, which transformers reads without another package."""
    from transformers.integrations.bitnet import BitLinear, pack_weights

    model = random_model(config_of("llama"))
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            packed = BitLinear(module.in_features, module.out_features, bias=False, dtype=torch.float32)
            packed.weight = pack_weights(module.weight.detach().sign())
            packed.weight_scale = module.weight.detach().abs().mean().reshape(1).reciprocal()
            model.set_submodule(name, packed)
    model.config.quantization_config = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def test_a_folder_that_others_have_quantized_is_loaded_as_it_is(tmp_path: Path) -> None:
    model = ternary(tmp_path / "theirs")
    with torch.compiler.set_stance("force_eager"):
        base = load_base(str(tmp_path / "theirs"), "int4", "cpu")
    assert base.precision == base.facts.precision == "bitnet"
    # transformers compiles how the ternary weights are unpacked, which takes longer than all else that is tested here.
    with torch.inference_mode(), torch.compiler.set_stance("force_eager"):
        ours, theirs = (m(input_ids=some_ids()).logits for m in (base.model, model))
    assert_close(ours, theirs, atol=1e-4, rtol=0.0)
    with pytest.raises(BaseError, match="quantized by others"):
        load_base(str(tmp_path / "theirs"), "int4", "cpu", for_training=True)


def test_what_transformers_unpacks_since_it_can_not_multiply_it_here_is_said(tmp_path: Path) -> None:
    model = random_of_type(tiny_config("gpt_oss")).bfloat16()
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    found = {}
    for name, tensor in model.state_dict().items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):  # MXFP4: 32 numbers in 16 bytes and one scale
            experts, width, out = tensor.shape
            found[f"{name}_blocks"] = torch.zeros(experts, out, width // 32, 16, dtype=torch.uint8)
            found[f"{name}_scales"] = torch.full((experts, out, width // 32), 122, dtype=torch.uint8)
        else:
            found[name] = tensor.contiguous()
    save_file(found, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "mxfp4"}}))
    assert load_base(str(tmp_path), "int4", "cpu").precision == "mxfp4, unpacked to bfloat16"


def test_a_quantization_that_can_not_run_here_is_refused_with_its_reason(zoo: Zoo, tmp_path: Path) -> None:
    shutil.copytree(zoo.base("llama"), tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs/config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    (tmp_path / "theirs/config.json").write_text(json.dumps(config))
    with pytest.raises(
        BaseError, match=r"quantized by others .gptq, 4 bits., and can't be loaded on cpu here: .+"
    ) as refusal:
        load_base(str(tmp_path / "theirs"), "int4", "cpu")
    assert str(refusal.value.next_step).endswith("dense copy of it")
