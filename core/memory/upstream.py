"""What the estimate takes of torch and transformers beyond their documented faces; a test holds each fact.

FakeTensorMode      tensors without memory that say which device they are on (what torch.compile reasons with)
TorchDispatchMode   told of every operation and its results
storage_key         the same number for all tensors over one storage, for as long as it lives
quantize_layers     transformers' own replacement of layers, without weights
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

__all__ = ["FakeTensorMode", "TorchDispatchMode", "quantize_layers", "storage_key", "tree_iter"]


def storage_key(tensor: Tensor) -> int:
    """What tells the storage of a tensor from all others that are alive."""
    return int(tensor.untyped_storage()._cdata)


def quantize_layers(model: Any, how: Any) -> None:
    """Replace the layers of a model on the meta device by those of a transformers quantization configuration."""
    from transformers.quantizers.auto import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(how, pre_quantized=True)
    quantizer.preprocess_model(model, device_map=None)
    quantizer.postprocess_model(model)
