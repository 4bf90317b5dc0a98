"""What is planned without weights is what is there once they are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from lora_rt.core.base.default import CONFIG
from lora_rt.core.base.load import load_base
from lora_rt.core.base.precision import PRECISIONS, Precision
from lora_rt.core.memory.estimate import plan_memory, read_config
from lora_rt.core.memory.inference import InferenceMemory, plan_inference
from lora_rt.core.memory.live import LiveMemory
from lora_rt.core.memory.skeleton import bytes_of, resident
from lora_rt.core.memory.training import TrainingMemory, plan_training
from lora_rt.core.memory.workload import Workload
from lora_rt.core.runtime import Runtime
from lora_rt.core.step.adapter import checkpointed, with_adapter
from lora_rt.core.step.attention import attend_in_float32
from lora_rt.core.step.fused import fuse
from lora_rt.core.step.loss import label_nll
from lora_rt.core.step.settings import TrainSettings
from support.architectures.shrink import random_model as random_of_type
from support.architectures.shrink import tiny_config
from support.tiny import Zoo

pytestmark = pytest.mark.slow

CLOSE = 0.01
"""The share by which weights, adapters and caches may differ from their plan."""


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings("plan", "output-only", Path(), **changes)


def inference(base: Path | str, precision: Precision, *, adapters: int = 0, **changes: Any) -> InferenceMemory:
    size = {"rows": 2, "tokens": 24} | {key: changes.pop(key) for key in ("rows", "tokens") if key in changes}
    return plan_inference(
        read_config(str(base)).config, precision, "cpu", settings(**changes), adapters=adapters, **size
    )


def training(
    base: Path,
    precision: Precision,
    rows: int,
    tokens: int,
    labels: int,
    *,
    checkpointing: bool = False,
    **changes: Any,
) -> TrainingMemory:
    return plan_training(
        read_config(str(base)).config,
        precision,
        "cpu",
        settings(**changes),
        rows=rows,
        tokens=tokens,
        labels=labels,
        optimizer="adamw",
        checkpointing=checkpointing,
    )


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("tied", [True, False])
def test_planned_weights_are_the_bytes_that_a_runtime_holds(zoo: Zoo, precision: Precision, tied: bool) -> None:
    """In the layout that bitsandbytes gives them at the first forward pass, where it does."""
    changes = {"tie_word_embeddings": tied, "num_hidden_layers": 5}
    runtime = zoo.runtime("llama", precision, **changes)
    plan = inference(zoo.base("llama", **changes), precision, target_modules=("q_proj", "v_proj"))
    assert plan.weights == pytest.approx(bytes_of(runtime.model), rel=CLOSE)


@pytest.mark.parametrize("architecture", ["gpt2", "gemma", "opt"])
@pytest.mark.parametrize("precision", ["bfloat16", "int8", "int4"])
def test_planned_weights_for_training_are_those_that_are_loaded_for_it(
    zoo: Zoo, architecture: str, precision: Precision
) -> None:
    base = zoo.base(architecture)
    loaded = load_base(str(base), precision, "cpu", for_training=True)
    loaded.model(torch.ones((1, 2), dtype=torch.long))  # before it, scales of int8 lie where they are not looked for
    plan = training(base, precision, 2, 8, 7, target_modules=("all-linear",))
    assert plan.weights == pytest.approx(bytes_of(loaded.model), rel=CLOSE)


def test_the_default_base_is_planned_without_a_file_and_rightly(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shape stands in the code; here it meets the real one, in the cache that the tests of the registers fill."""
    before = inference("default", "int4", adapters=1, r=8, target_modules=("all-linear",))
    monkeypatch.setenv("LORA_RT_HOME", str(request.config.cache.mkdir("lora-rt-home")))
    runtime = Runtime.load("default", device="cpu")
    config = runtime.model.config
    assert {key: getattr(config, key) for key in CONFIG} == CONFIG
    assert before.weights == pytest.approx(bytes_of(runtime.model), rel=CLOSE)
    runtime.load_adapter("logic")
    assert before.adapters == pytest.approx(bytes_of_residents(runtime), rel=CLOSE)
    file = Path(__file__).parents[2] / "registry/shipped/logic/adapter_model.safetensors"
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    on_disk = file.stat().st_size - header
    assert before.adapters / 2 == pytest.approx(on_disk, rel=CLOSE)  # bfloat16 on disk, float32 in memory on a CPU
    runtime.generate(["a"], "logic", max_new_tokens=3)
    read_by_steps = [tensor for own in runtime.parts.bank._own._known.values() for tensor in own.tensors]
    if read_by_steps:  # steps are made in one call here
        assert before.narrow == pytest.approx(sum(tensor.nbytes for tensor in read_by_steps), rel=CLOSE)


def bytes_of_residents(runtime: Runtime) -> int:
    residents = runtime.parts.bank.residents.values()
    return sum(tensor.nbytes for one in residents for f in one.factors.values() for tensor in (f.a, f.b))


@pytest.mark.parametrize("count", [1, 3])
def test_planned_adapters_are_the_residents_and_their_stack(zoo: Zoo, count: int) -> None:
    runtime = zoo.runtime("llama", fresh=True)
    names = [f"a{number}" for number in range(count)]
    for name in names:
        runtime.load_adapter(str(zoo.adapter("llama", r=4, targets=("q_proj", "down_proj"))), name=name)
    plan = inference(zoo.base("llama"), "float32", adapters=count, r=4, target_modules=("q_proj", "down_proj"))
    assert plan.adapters == bytes_of_residents(runtime)
    running = runtime.parts.bank.plan([dict.fromkeys(names, 1.0)])
    assert running is not None
    stacked = [group.a for group in running.stack.groups.values()] + [s.b for s in running.stack.sites if s]
    copies = sum(tensor.nbytes for tensor in stacked) if count > 1 else 0
    assert plan.stacked == copies
    assert plan.narrow == 0  # no step of a base in float32 is made in one call


@pytest.mark.parametrize("window", [None, 8])
def test_the_planned_cache_is_that_of_a_real_prefill(zoo: Zoo, window: int | None) -> None:
    base = zoo.base("mistral", sliding_window=window)
    model = load_base(str(base), "bfloat16", "cpu").model
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(input_ids=torch.ones((3, 20), dtype=torch.long), past_key_values=cache, use_cache=True)
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert inference(base, "bfloat16", rows=3, tokens=20).kv_cache == real


def real_step(base: Path, precision: Precision, rows: int, tokens: int, labels: int, *, checkpointing: bool) -> Any:
    """Saved bytes at the end of the forward pass, and the peak of a whole step, over real tensors."""
    loaded = load_base(str(base), precision, "cpu", for_training=True)
    model = with_adapter(loaded.model, settings()).train()
    attend_in_float32(model)
    fuse(model, lambda: False)
    if checkpointing:
        checkpointed(model)
    saved: dict[int, int] = {}
    own = {tensor.untyped_storage()._cdata for tensor in resident(model)}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved[storage._cdata] = storage.nbytes()
        return tensor

    ids = torch.ones((rows, tokens), dtype=torch.long)
    wanted = torch.full_like(ids, -100)
    wanted[:, tokens - labels :] = 1
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    mask = torch.ones_like(ids)
    mask[0, -1] = 0  # a batch with padding, as nearly all are; without any, no mask is made
    batch = {"input_ids": ids, "attention_mask": mask, "labels": wanted}
    with LiveMemory(resident(model)) as live:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            sums, _ = label_nll(model, batch)
        total = sum(saved.values())
        sums.sum().backward()
    return total, live.peak


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int4"])
def test_planned_activations_are_what_a_real_step_saves_and_its_peak(zoo: Zoo, precision: Precision) -> None:
    base = zoo.base("llama", num_hidden_layers=6)
    saved, peak = real_step(base, precision, 4, 64, 8, checkpointing=False)
    plan = training(base, precision, 4, 64, 8)
    assert plan.activations == pytest.approx(peak, rel=0.02)
    assert plan.activations == pytest.approx(saved, rel=0.15)


def test_planned_activations_with_checkpointing_are_those_of_a_real_step(zoo: Zoo) -> None:
    base = zoo.base("llama", num_hidden_layers=6)
    _, peak = real_step(base, "float32", 4, 64, 8, checkpointing=True)
    plan = training(base, "float32", 4, 64, 8, checkpointing=True)
    assert plan.activations == pytest.approx(peak, rel=0.02)
    assert plan.activations < training(base, "float32", 4, 64, 8).activations / 2


def test_blocks_that_differ_are_all_looked_at(zoo: Zoo) -> None:
    """Four blocks of which one has no bias are counted one by one; so are those of a model of four alike."""
    config = read_config(str(zoo.base("llama", num_hidden_layers=4))).config
    alike = training(zoo.base("llama", num_hidden_layers=4), "float32", 2, 16, 8)
    from lora_rt.core.memory import skeleton

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(skeleton, "uniform", lambda _blocks: False)
        one_by_one = plan_training(
            config, "float32", "cpu", settings(), rows=2, tokens=16, labels=8, optimizer="adamw", checkpointing=False
        )
    assert alike == one_by_one


def test_the_optimizers_state_is_that_of_the_optimizer(zoo: Zoo) -> None:
    plan = training(zoo.base("llama"), "float32", 2, 8, 7, r=8)
    model = with_adapter(load_base(str(zoo.base("llama")), "float32", "cpu").model, settings(r=8))
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    states = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor) and t.dim()]
    assert plan.optimizer == sum(t.nbytes for t in states)
    assert plan.gradients == plan.adapter == sum(p.nbytes for p in trained)


def test_a_layer_is_unpacked_in_the_compute_dtype(zoo: Zoo) -> None:
    base = zoo.base("llama")
    model = load_base(str(base), "int4", "cpu").model
    largest = max(m.in_features * m.out_features for m in model.model.modules() if isinstance(m, nn.Linear))
    assert inference(base, "int4").workspace == 2 * largest


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["mamba2", "dbrx"])
def test_a_model_without_keys_and_one_that_asks_its_data_are_planned(tmp_path: Path, kind: str) -> None:
    """A recurrence keeps a state of one size; DBRX asks which of its experts are hit, which fake tensors don't know."""
    model = random_of_type(tiny_config(kind))
    model.save_pretrained(tmp_path)
    workload = Workload(device="cpu", r=4, target_modules=("all-linear",), batch=2, seq=32, adapters=1, labels=31)
    plan = plan_memory(read_config(str(tmp_path)), ["float32"], workload)
    (found,) = plan.precisions
    assert found.inference.weights == pytest.approx(4 * sum(p.numel() for p in model.parameters()), rel=0.01)
    with torch.no_grad():
        output = model(input_ids=torch.zeros((2, 32), dtype=torch.long), use_cache=True)
    cache = output.past_key_values if kind == "dbrx" else output.cache_params
    kept = [t for layer in cache.layers for t in _tensors(layer)]
    assert found.inference.kv_cache == sum(t.untyped_storage().nbytes() for t in kept)


def _tensors(layer: Any) -> list[Tensor]:
    values = [v for value in vars(layer).values() for v in (value.values() if isinstance(value, dict) else [value])]
    return [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
