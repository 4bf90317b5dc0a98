"""Facts about transformers that a base stands on. A failure here names what an upgrade changed."""

from __future__ import annotations

import inspect

import torch
from transformers import AutoModelForCausalLM, GenerationMixin, MambaConfig

from lora_rt.core.base.upstream import keeps_a_state
from support.tiny import config_of


def test_a_recurrent_model_says_that_it_keeps_a_state_and_others_do_not() -> None:
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config_of("llama"))
        recurrent = AutoModelForCausalLM.from_config(MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=32))
    assert (keeps_a_state(plain), keeps_a_state(recurrent)) == (False, True)


def test_transformers_itself_asks_for_it_by_this_name() -> None:
    assert "_is_stateful" in inspect.getsource(GenerationMixin)
