"""Facts about transformers that a base stands on. A failure here names what an upgrade changed."""

from __future__ import annotations

import inspect

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, MambaConfig

from lora_rt.core.base.precision import quantization_config
from lora_rt.core.base.upstream import keeps_a_state, quantize_layers
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
