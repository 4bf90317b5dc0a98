"""Facts about bitsandbytes and torch that products stand on. A failure here names what an upgrade changed."""

from __future__ import annotations

import ctypes
import inspect
from typing import Any

import torch
from torch import Tensor, nn


def test_bitsandbytes_keeps_its_library_for_the_processor_in_a_wrapper() -> None:
    from bitsandbytes import cextension

    assert isinstance(cextension.lib._lib, ctypes.CDLL), "of which a kernel is called without the layers above it"


def test_bitsandbytes_notes_on_a_weight_s_state_that_it_was_packed_for_the_processor() -> None:
    from bitsandbytes import functional
    from bitsandbytes.nn import Linear4bit, modules

    assert "packing_format_for_cpu = True" in inspect.getsource(functional)
    assert "packing_format_for_cpu" in inspect.getsource(Linear4bit)
    assert "support_avx512bf16_for_cpu" in inspect.getsource(modules), "by which a layer is told to pack or not"


class Answering(nn.Parameter):
    """Answers through Python, as the weights of bitsandbytes do."""

    asked = 0

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        Answering.asked += 1
        return super().__torch_function__(func, types, args, kwargs or {})


def test_torch_asks_a_tensor_past_its_class_where_it_is_told_to() -> None:
    weight = Answering(torch.ones(2), requires_grad=False)
    with torch._C.DisableTorchFunctionSubclass():
        place = weight.data_ptr(), weight._version
        assert Answering.asked == 0
    assert (weight.data_ptr(), weight._version) == place
    assert Answering.asked == 2


def test_torch_counts_the_changes_of_a_tensor_in_place() -> None:
    weight = torch.ones(2)
    before = weight._version
    view: Tensor = weight[:1]
    view.add_(1)
    assert weight._version == before + 1
    assert Tensor._version.__get__(weight) == weight._version  # type: ignore[attr-defined]  # asked as a function, too


def test_torch_with_onednn_has_the_products_of_weights_in_blocks() -> None:
    """What is computed is compared in `tests/multiply/test_blocked.py`."""
    if torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        assert all(hasattr(torch.ops.mkldnn, name) for name in ("_reorder_linear_weight", "_linear_pointwise"))
