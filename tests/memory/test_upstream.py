"""Facts about torch and transformers that the estimate stands on. A failure here names what an upgrade changed."""

from __future__ import annotations

import gc

import torch
from torch import nn

from lora_rt.core.base.precision import quantization_config
from lora_rt.core.memory.upstream import FakeTensorMode, TorchDispatchMode, quantize_layers, storage_key
from support.tiny import config_of


def test_fake_tensors_say_that_they_are_on_the_cpu_and_keep_shapes() -> None:
    with FakeTensorMode():
        product = torch.empty(3, 1 << 40) @ torch.empty(1 << 40, 2)
    assert (tuple(product.shape), product.device.type) == ((3, 2), "cpu")


def test_tensors_over_one_storage_share_its_key_and_others_do_not() -> None:
    tensor = torch.empty(4)
    assert storage_key(tensor) == storage_key(tensor[1:]) != storage_key(torch.empty(4))


def test_a_dispatch_mode_hears_of_every_operation() -> None:
    heard = []

    class Heard(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            heard.append(str(function))
            return function(*args, **(kwargs or {}))

    with Heard():  # type: ignore[no-untyped-call]
        torch.ones(2) + 1
    assert any("add" in name for name in heard)


def test_one_python_object_stands_for_a_storage_until_its_last_tensor_is_gone() -> None:
    import weakref

    ended = []
    tensor = torch.empty(4)
    weakref.finalize(tensor.untyped_storage(), ended.append, True)
    view = tensor[1:]
    del tensor
    gc.collect()
    assert not ended
    del view
    gc.collect()
    assert ended


def test_layers_are_replaced_without_weights() -> None:
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of("llama"))
    quantize_layers(model, quantization_config("int4"))
    kinds = {type(m).__module__.split(".")[0] for m in model.model.modules() if isinstance(m, nn.Linear)}
    assert kinds == {"bitsandbytes"}
