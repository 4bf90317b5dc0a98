"""Facts about transformers, torch and accelerate that a base stands on. A failure names what an upgrade changed."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, MambaConfig, PretrainedConfig

from lora_rt.core.base.precision import quantization_config
from lora_rt.core.base.upstream import (
    attention_of,
    can_attend_otherwise,
    compiled_call,
    device_hook,
    forget_attention,
    gated,
    gguf_bar_hidden,
    keeps_a_state,
    origin_of,
    own_tensors,
    quantize_layers,
    set_compiled_call,
    uncompiled,
)
from support.architectures.shrink import random_model, tiny_config
from support.tiny import config_of


def test_a_recurrent_model_says_that_it_keeps_a_state_and_others_do_not() -> None:
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config_of("llama"))
        recurrent = AutoModelForCausalLM.from_config(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32))
    assert (keeps_a_state(plain), keeps_a_state(recurrent)) == (False, True)


def test_transformers_itself_asks_for_it_by_this_name() -> None:
    assert "_is_stateful" in inspect.getsource(GenerationMixin)


def test_layers_are_replaced_without_weights() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of("llama"))
    quantize_layers(model, quantization_config("int4"))
    kinds = {type(m).__module__.split(".")[0] for m in model.model.modules() if isinstance(m, nn.Linear)}
    assert kinds == {"bitsandbytes"}


def test_a_configuration_says_what_its_model_attends_with_and_forgets_it() -> None:
    config = config_of("llama")
    config._attn_implementation = "eager"
    with torch.device("meta"):
        assert attention_of(AutoModelForCausalLM.from_config(config).config) == "eager"
        forget_attention(config)
        model = AutoModelForCausalLM.from_config(config)
    assert attention_of(model.config) == "sdpa"
    assert can_attend_otherwise(model)


def test_a_configuration_says_where_it_was_read(tmp_path: Path) -> None:
    config_of("llama").save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert origin_of(config) == (str(tmp_path), None)
    config._commit_hash = "c"
    assert origin_of(config)[1] == "c"
    assert {"_name_or_path", "_commit_hash"} <= set(re.findall(r"_[a-z_]+", inspect.getsource(PretrainedConfig)))


def test_fused_experts_apply_their_gate_between_two_products() -> None:
    with torch.device("meta"):
        experts = random_model(tiny_config("mixtral")).model.layers[0].mlp.experts
    assert hasattr(experts, "_apply_gate")
    first = torch.ones(3, 2 * experts.down_proj.shape[2], device="meta")
    assert gated(experts, first).shape == (3, experts.down_proj.shape[2])


def test_transformers_reader_of_gguf_files_has_a_bar_by_this_name() -> None:
    from transformers import modeling_gguf_pytorch_utils as reader

    before = reader.tqdm
    with gguf_bar_hidden():
        assert reader.tqdm([1], desc="tensors").disable
    assert reader.tqdm is before
    assert "tqdm(" in inspect.getsource(reader)


def test_what_torch_compile_makes_of_a_module_holds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    module = nn.Linear(2, 2)
    assert compiled_call(module) is None
    monkeypatch.setattr(torch, "compile", lambda call, **_: call)
    module.compile()
    assert compiled_call(module) is not None
    set_compiled_call(module, None)
    assert compiled_call(module) is None
    from torch._dynamo.eval_frame import OptimizedModule

    assert "_orig_mod" in inspect.getsource(OptimizedModule)
    assert uncompiled(module) is module


def test_what_is_put_among_a_modules_own_tensors_is_the_modules() -> None:
    module = nn.BatchNorm1d(2)
    parameters, buffers = own_tensors(module)
    parameters["weight"] = nn.Parameter(torch.full((2,), 7.0))
    buffers["running_mean"] = torch.full((2,), 5.0)
    assert (module.weight.tolist(), dict(module.named_buffers())["running_mean"].tolist()) == ([7, 7], [5, 5])


def test_accelerate_keeps_its_hook_at_the_module_until_it_is_taken_away() -> None:
    module, hook = nn.Linear(2, 2), AlignDevicesHook(execution_device="cpu")
    assert device_hook(module) is None
    add_hook_to_module(module, hook)
    assert device_hook(module) is hook
    assert hook.execution_device == "cpu"
    add_hook_to_module(module, AlignDevicesHook(), append=True)
    assert device_hook(module).hooks[0] is hook
    remove_hook_from_module(module)
    assert device_hook(module) is None
