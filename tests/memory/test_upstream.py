"""Facts about torch, transformers and bitsandbytes that the estimate stands on; a failure says which one changed."""

from __future__ import annotations

import gc

import pytest
import torch

from lora_rt.core.memory.upstream import (
    FakeTensorMode,
    TorchDispatchMode,
    empty_4bit,
    empty_8bit_state,
    storage_key,
)


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


@pytest.mark.slow
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


def kept(state: object) -> dict[str, tuple[torch.dtype, int]]:
    """Name -> dtype and number of values of every tensor that a QuantState keeps, those of its scales too."""
    found = {}
    for level in (state, getattr(state, "state2", None)):
        for name, value in vars(level).items():
            if isinstance(value, torch.Tensor):
                found[f"{'nested ' * (level is not state)}{name}"] = (value.dtype, value.numel())
    return found


def test_an_empty_4bit_weight_keeps_what_a_quantized_one_keeps() -> None:
    from bitsandbytes.nn import Linear4bit

    layer = Linear4bit(320, 192, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4", compress_statistics=True)
    real = layer.to("cpu").weight
    empty = empty_4bit(layer, real)
    assert (empty.dtype, empty.shape) == (real.dtype, real.shape)
    assert kept(empty.quant_state) == kept(real.quant_state)  # type: ignore[attr-defined]


def test_an_8bit_layer_has_its_weight_and_scales_where_the_estimate_puts_them() -> None:
    from bitsandbytes.nn import Linear8bitLt

    layers = [Linear8bitLt(64, 32, bias=False, has_fp16_weights=False).to("cpu").eval() for _ in range(2)]
    with torch.no_grad():
        layers[0](torch.ones(1, 64, dtype=torch.float16))
    empty_8bit_state(layers[1])
    real, empty = ([layer.state.CB, layer.state.SCB] for layer in layers)
    assert [(x.dtype, x.shape) for x in real] == [(x.dtype, x.shape) for x in empty]
    assert layers[0].weight.CB is None
    assert layers[0].weight.SCB is None
