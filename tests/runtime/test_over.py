"""A model that a caller has loaded: the engine adds to its layers, whatever they are, and leaves it as it was.

The oracle is PEFT's change of every module, added to the outputs of a twin's layers by hooks of the test's own.
"""

from __future__ import annotations

import copy
import functools
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from lora_rt.core.generation import prompts
from lora_rt.core.runtime import Runtime
from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import Gate
from lora_rt.registry.card import AdapterCard, BaseIdentity, write_card
from support.tiny import Zoo, config_of, deltas, random_model, save_adapter, save_tokenizer, some_ids

pytestmark = pytest.mark.slow

IDS = some_ids(rows=2)
EXACT = {"atol": 1e-4, "rtol": 0.0}


class Packed(nn.Module):
    """A layer as a stranger makes it: int8 codes and one scale per output, no `weight`."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach()
        scales = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (weight / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.codes * self.scales).T.to(x.dtype)


class Telling(Packed):
    """The same that says its sizes, as GPTQ's, AWQ's and HQQ's do."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear)
        self.in_features, self.out_features = linear.in_features, linear.out_features


class Scale(nn.Module):
    """A stranger's layer that is no matrix: nothing may be added to it, nor be expected for it."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.full((size,), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.by


def packed(model: Any, kind: type[Packed]) -> Any:
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and "layers" in name:
            model.set_submodule(name, kind(module))
    return model


def dynamic(model: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def scaled(model: Any) -> Any:
    for layer in model.model.layers:
        layer.self_attn.o_proj = nn.Sequential(layer.self_attn.o_proj, Scale(layer.self_attn.o_proj.out_features))
    return model


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="eager")


def compiled_in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def offloaded(model: Any) -> Any:
    from accelerate import cpu_offload

    return cpu_offload(model, execution_device=torch.device("cpu"))


def compiled_blocks(model: Any) -> Any:
    for number, block in enumerate(model.model.layers):
        model.model.layers[number] = torch.compile(block, backend="eager")
    return model


def offloaded_to_disk(model: Any) -> Any:
    from accelerate import disk_offload

    return disk_offload(model, tempfile.mkdtemp(), execution_device=torch.device("cpu"))


def checkpointed(model: Any) -> Any:
    model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers', of its own use of it
        model.gradient_checkpointing_enable()
    return model


def patched(model: Any) -> Any:
    for module in (model, model.model.layers[0].self_attn, model.model.layers[1].mlp.up_proj):
        module.forward = functools.partial(module.forward)
    return model


KINDS: dict[str, Callable[[Any], Any]] = {
    "dense": lambda model: model,
    "packed": lambda model: packed(model, Packed),
    "packed, with sizes": lambda model: packed(model, Telling),
    "torch.ao": dynamic,
    "bfloat16": lambda model: model.bfloat16(),
    "float16": lambda model: model.half(),
    "training": lambda model: model.train(),
    "compiled": compiled,
    "compiled in place": compiled_in_place,
    "compiled blocks": compiled_blocks,
    "offloaded": offloaded,
    "offloaded to disk": offloaded_to_disk,
    "checkpointed": checkpointed,
    "patched": patched,
}
OTHERWISE = ("packed", "packed, with sizes", "torch.ao", "bfloat16", "float16")  # other numbers than the dense model


@pytest.fixture
def tokenizer(tmp_path: Path) -> Any:
    from transformers import AutoTokenizer

    save_tokenizer(tmp_path / "words")
    return AutoTokenizer.from_pretrained(tmp_path / "words")


def with_hooks(model: Any, change: Any, weight: float) -> Tensor:
    """The logits of a model to whose layers' outputs the change of an adapter is added."""
    handles = []
    for name, (delta, _) in change.items():

        def add(_module: Any, given: Any, output: Tensor, delta: Tensor = delta) -> Tensor:
            return output + (weight * (given[0].float() @ delta.T)).to(output.dtype)

        handles.append(model.get_submodule(name).register_forward_hook(add))
    with torch.inference_mode():
        found: Tensor = model(input_ids=IDS).logits
    for handle in handles:
        handle.remove()
    return found.float()


def state(model: Any) -> dict[str, Any]:
    """Everything about a model that a caller could see."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        own = {key: value for key, value in vars(module).items() if key not in ("_parameters", "_buffers", "_modules")}
        found[name] = {key: dict(value) if isinstance(value, dict) else value for key, value in own.items()}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        found[f"tensor {name}"] = (id(tensor), tensor.requires_grad, tensor.is_inference(), tensor._version)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_any_model_in_memory_computes_the_dense_sum_and_is_given_back(kind: str, zoo: Zoo, tokenizer: Any) -> None:
    adapter = zoo.adapter("llama")
    model = KINDS[kind](random_model(config_of("llama")))
    twin = KINDS[kind if kind in OTHERWISE else "dense"](random_model(config_of("llama")))
    before, generation = state(model), model.generation_config.to_dict()
    with Runtime.over(model, tokenizer) as rt:
        name = rt.load_adapter(str(adapter))
        wanted = with_hooks(twin, deltas(zoo.base("llama"), adapter), 0.7)
        bound = {"bfloat16": 0.1, "float16": 0.02}.get(kind, 1e-4)
        assert_close(rt.logits(IDS, compositions=f"{name}:0.7").float(), wanted, atol=bound, rtol=0.0)
        assert_close(rt.logits(IDS).float(), with_hooks(twin, {}, 0), atol=bound, rtol=0.0)
        both = rt.generate(["one", "two two"], [f"{name}:2", None], max_new_tokens=5)
        assert both[1] == rt.generate("two two", max_new_tokens=5)
        assert "".join(rt.stream("one", f"{name}:2", max_new_tokens=5)) == both[0]
        assert rt.base_digest() == rt.base_digest()
    assert state(model) == before
    assert model.generation_config.to_dict() == generation


def test_a_layer_that_is_no_matrix_is_left_alone(zoo: Zoo, tokenizer: Any) -> None:
    model = scaled(random_model(config_of("llama")))
    with Runtime.over(model, tokenizer) as rt:
        names = set(rt.parts.bank.topology.by_name)
    assert "model.layers.0.self_attn.o_proj.0" in names
    assert "model.layers.0.self_attn.o_proj.1" not in names


def test_the_base_of_a_peft_model_is_used_and_its_adapter_stays_out(zoo: Zoo, tokenizer: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    mine = zoo.adapter("llama")
    bare = random_model(config_of("llama"))
    options = {"target_modules": ["q_proj", "down_proj", "embed_tokens"], "modules_to_save": ["norm"]}
    theirs = get_peft_model(copy.deepcopy(bare), LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                parameter.normal_(0, 0.1)
    theirs.train()
    before, own = state(theirs), theirs.eval()(input_ids=IDS).logits
    theirs.train()
    with Runtime.over(theirs, tokenizer) as rt:
        name = rt.load_adapter(str(mine))
        wanted = with_hooks(bare, deltas(zoo.base("llama"), mine), 1.0)
        assert_close(rt.logits(IDS, compositions=name), wanted, **EXACT)
        assert_close(rt.logits(IDS), with_hooks(bare, {}, 0), **EXACT)
        assert_close(theirs(input_ids=IDS).logits, own, **EXACT)  # theirs acts in a call of theirs
    assert state(theirs) == before


def test_of_a_peft_model_with_several_adapters_none_acts_and_all_are_there_again(zoo: Zoo, tokenizer: Any) -> None:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    theirs = get_peft_model(random_model(config_of("llama")), settings)
    theirs.add_adapter("second", settings)
    theirs.base_model.set_adapter(["default", "second"])
    theirs.eval()
    before, own = state(theirs), theirs(input_ids=IDS).logits
    with Runtime.over(theirs, tokenizer) as rt:
        name = rt.load_adapter(str(zoo.adapter("llama")))
        wanted = with_hooks(random_model(config_of("llama")), deltas(zoo.base("llama"), zoo.adapter("llama")), 1.0)
        assert_close(rt.logits(IDS, compositions=name), wanted, **EXACT)
    assert state(theirs) == before
    assert_close(theirs(input_ids=IDS).logits, own, **EXACT)


def test_a_model_that_gives_tuples_is_refused(tokenizer: Any) -> None:
    model = random_model(config_of("llama"))
    model.config.return_dict = False
    with pytest.raises(LoraRtError, match="gives tuples"):
        Runtime.over(model, tokenizer)


def test_a_peft_model_with_a_merged_adapter_is_refused_and_left_alone(zoo: Zoo, tokenizer: Any) -> None:
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"])
    theirs = get_peft_model(random_model(config_of("llama")), settings)
    theirs.merge_adapter()
    with pytest.raises(LoraRtError, match="merged"):
        Runtime.over(theirs, tokenizer)


def test_layers_of_one_model_may_lie_on_several_devices() -> None:
    """Tensors without values know their devices, and refuse to be added to one of another."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from lora_rt.core.engine.bank import AdapterBank
    from lora_rt.core.engine.resident import ResidentAdapter
    from lora_rt.core.engine.stack import Factors

    def moved(module: nn.Module, device: str) -> None:
        def move(given: Any) -> Any:
            return given.to(device) if isinstance(given, Tensor) else given

        def before(_module: Any, args: Any, named: Any) -> Any:
            other = {key: tuple(map(move, v)) if isinstance(v, tuple) else move(v) for key, v in named.items()}
            return tuple(map(move, args)), other

        for part in module.modules():
            part._parameters |= {
                k: nn.Parameter(v.detach().to(device)) for k, v in part._parameters.items() if v is not None
            }
            part._buffers |= {k: v.to(device) for k, v in part._buffers.items() if v is not None}
        module.register_forward_pre_hook(before, with_kwargs=True)

    with FakeTensorMode(allow_non_fake_inputs=True):
        model = random_model(config_of("llama"))
        for part, device in {
            "model.embed_tokens": "cpu",
            "model.layers.0": "cpu",
            "model.layers.1": "cpu:1",
            "lm_head": "cpu:1",
        }.items():
            moved(model.get_submodule(part), device)
        moved(model.model.norm, "cpu:1")
        moved(model.model.layers[1].self_attn.v_proj, "cpu")  # though q and k, which read the same, lie elsewhere
        model.model.layers[1].self_attn.v_proj.register_forward_hook(lambda _module, _given, output: output.to("cpu:1"))
        bank = AdapterBank(model, torch.float32)
        places = {site.name: str(site.device) for site in bank.topology.sites}
        assert places["model.layers.1.self_attn.v_proj"] == places["model.layers.0.mlp.up_proj"] == "cpu"
        assert places["model.layers.1.self_attn.q_proj"] == "cpu:1"
        factors = {
            site.name: Factors(torch.ones(4, site.in_features), torch.ones(site.out_features, 4))
            for site in bank.topology.sites
        }
        bank.add(ResidentAdapter("one", factors, "output-only"))
        gate = Gate(ranks=torch.ones(1, 2, 1, 1))
        for plan in (bank.plan([{"one": 0.5}, {}]), bank.plan([{"one": 0.5}, {}], {"one": gate})):
            assert plan is not None
            with plan.running(2, 9), torch.no_grad():
                logits = model(input_ids=torch.zeros(2, 9, dtype=torch.long), use_cache=False).logits
            assert (str(logits.device), logits.shape) == ("cpu:1", (2, 9, 264))


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_runtimes_over_one_model_close_in_any_order(order: tuple[int, int], zoo: Zoo, tokenizer: Any) -> None:
    adapter, model = zoo.adapter("llama"), random_model(config_of("llama")).train()
    before = state(model)
    both = [Runtime.over(model, tokenizer), Runtime.over(model, tokenizer)]
    wanted = with_hooks(random_model(config_of("llama")), deltas(zoo.base("llama"), adapter), 1.0)
    for rt in both:
        rt.load_adapter(str(adapter), "one")
        assert_close(rt.logits(IDS, compositions="one"), wanted, **EXACT)
    both[order[0]].close()
    assert_close(both[order[1]].logits(IDS, compositions="one"), wanted, **EXACT)
    both[order[1]].close()
    assert state(model) == before


def test_a_model_is_as_it_was_when_the_runtime_fails_to_be_made(
    zoo: Zoo, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = random_model(config_of("llama")).train()
    before = state(model)
    tokenizer.chat_template = "{{ 1 / 0 }"
    with pytest.raises(LoraRtError):
        Runtime.over(model, tokenizer, template_variables={"nothing": 1})
    tokenizer.chat_template = None
    model.model.layers[1].mlp.down_proj.weight.data = model.model.layers[1].mlp.down_proj.weight.data[:, :5]
    with pytest.raises(Exception):  # noqa: B017  # whatever torch says of a broken model
        Runtime.over(model, tokenizer)
    assert {k: v for k, v in state(model).items() if "down_proj" not in k} == {
        k: v for k, v in before.items() if "down_proj" not in k
    }
    assert isinstance(prompts.TextFormat(tokenizer), prompts.TextFormat)


def test_training_goes_on_after_a_runtime_was_closed(zoo: Zoo, tokenizer: Any) -> None:
    model = random_model(config_of("llama")).train()
    with Runtime.over(model, tokenizer) as rt:
        rt.generate("a", max_new_tokens=3)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("given", [None, "words", nn.Linear(2, 2)])
def test_what_is_no_model_is_refused(given: Any, tokenizer: Any) -> None:
    with pytest.raises(LoraRtError, match="not a model of transformers"):
        Runtime.over(given, tokenizer)


def test_what_is_no_tokenizer_is_refused(tokenizer: Any) -> None:
    with pytest.raises(LoraRtError, match="not a tokenizer"):
        Runtime.over(random_model(config_of("llama")), "a name")


def test_a_model_that_does_not_run_in_float16_is_refused_with_precisions_that_may_do(tokenizer: Any) -> None:
    model = random_model(config_of("llama")).half()
    model.model.layers[0].mlp.up_proj.float()  # as DeepSeek V4 keeps some of its layers
    with pytest.raises(LoraRtError, match="can't be run in float16, as int8 computes") as refusal:
        Runtime.over(model, tokenizer)
    assert "bfloat16" in str(refusal.value.next_step)


def test_a_model_whose_weights_hold_nothing_is_refused(tokenizer: Any) -> None:
    model = random_model(config_of("llama"))
    model.model.layers[1].to("meta")
    with pytest.raises(LoraRtError, match="meta device") as refusal:
        Runtime.over(model, tokenizer)
    assert "device_map" in str(refusal.value.next_step)


def test_a_model_over_processor_and_disk_computes_what_it_computes_in_memory(
    zoo: Zoo, tokenizer: Any, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk", "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "disk"}
    load = AutoModelForCausalLM.from_pretrained
    model = load(zoo.base("llama"), device_map=places, offload_folder=tmp_path / "disk", dtype=torch.float32)
    own, adapter = zoo.runtime("llama"), zoo.adapter("llama")
    name = zoo.load(own, adapter)
    specs = [f"{name}:0.7", None]
    with Runtime.over(model, tokenizer) as rt:
        rt.load_adapter(str(adapter), name)
        assert_close(rt.logits(IDS, compositions=specs), own.logits(IDS, compositions=specs), **EXACT)


def test_a_model_without_an_output_head_is_refused(tokenizer: Any) -> None:
    with pytest.raises(LoraRtError, match="not a causal language model"):
        Runtime.over(random_model(config_of("llama")).model, tokenizer)


def test_what_the_model_calls_itself_decides_which_adapters_are_taken(
    zoo: Zoo, tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_adapter(tmp_path / "a", config_of("llama"), targets=["q_proj"])
    made_for = BaseIdentity(id="some/one", revision=None, digest="d" * 64)
    write_card(tmp_path / "a", AdapterCard(register="a", mode="output-only", base=made_for))
    model = random_model(config_of("llama"))
    with Runtime.over(model, tokenizer, "other/two") as rt, pytest.raises(LoraRtError, match="some/one"):
        rt.load_adapter(str(tmp_path / "a"))
    with caplog.at_level(logging.WARNING), Runtime.over(model, tokenizer, "some/one") as rt:
        assert (rt.base.id, rt.base.digest, rt.base.precision) == ("some/one", "", "float32")
        rt.load_adapter(str(tmp_path / "a"))
    assert not caplog.records
    with caplog.at_level(logging.WARNING), Runtime.over(model, tokenizer) as rt:
        assert rt.base.id == "LlamaForCausalLM"
        rt.load_adapter(str(tmp_path / "a"))
    assert "only the shapes agree" in caplog.text


def test_a_folder_as_base_id_is_told_by_its_weights(zoo: Zoo, tokenizer: Any) -> None:
    with Runtime.over(random_model(config_of("llama")), tokenizer, str(zoo.base("llama"))) as rt:
        assert rt.base.digest == zoo.runtime("llama").base.digest


def test_what_others_have_quantized_is_said(tokenizer: Any) -> None:
    with Runtime.over(dynamic(random_model(config_of("llama"))), tokenizer) as rt:
        assert rt.base.precision == "quantized (torch)"
    with Runtime.over(packed(random_model(config_of("llama")), Telling), tokenizer) as rt:
        assert rt.base.precision.startswith("quantized (")
