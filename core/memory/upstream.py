"""What the estimate takes of torch and transformers beyond their documented faces; a test holds each fact.

FakeTensorMode      tensors without memory that say which device they are on (what torch.compile reasons with)
FirstExpert         answers for them where a model asks its data: as if every token went to the first expert
TorchDispatchMode   told of every operation and its results
storage_key         the same number for all tensors over one storage, for as long as it lives
empty_4bit          bitsandbytes' QuantState beside a 4-bit weight: which tensors it has, and of what sizes
empty_8bit_state    where an 8-bit layer of bitsandbytes has its weight and scales between two forward passes
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

__all__ = [
    "FakeTensorMode",
    "FirstExpert",
    "TorchDispatchMode",
    "empty_4bit",
    "empty_8bit_state",
    "storage_key",
    "tree_iter",
]

_NESTED_BLOCK = 256  # bitsandbytes quantizes the scales of 4-bit weights in blocks of this many


class FirstExpert(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within a FakeTensorMode: what a model asks its data of, fake tensors do not know, and are answered for.

    A mixture asks which experts are hit, and who goes to each. The first is, and all go there: whichever experts take
    the pairs of tokens and experts, they are as many.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Called by torch for every operation."""
        if func is torch.ops.aten.nonzero.default:
            x = args[0]
            return x.new_empty((1 if x.dim() == 1 else x.numel(), x.dim()), dtype=torch.long)
        if func is torch.ops.aten._local_scalar_dense.default:
            return 0.0 if args[0].is_floating_point() else 0
        if func in _OF_OTHERS:  # in inference mode they arrive as one
            with self:
                result = func.decompose(*args, **(kwargs or {}))
            if result is not NotImplemented:
                return result
        return func(*args, **(kwargs or {}))


_OF_OTHERS = (
    torch.ops.aten.item.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.nonzero_numpy.default,
    torch.ops.aten.one_hot.default,
    torch.ops.aten.where.default,
)


def storage_key(tensor: Tensor) -> int:
    """What tells the storage of a tensor from all others that are alive."""
    return int(tensor.untyped_storage()._cdata)


def empty_4bit(module: Any, parameter: Any) -> nn.Parameter:
    """What bitsandbytes keeps of a 4-bit weight, with nothing in it, in place of a parameter of the meta device.

    Two weights in a byte, a scale of one byte for each block, and the scales of the scales in float32.
    """
    from bitsandbytes.functional import QuantState

    shape = torch.Size((module.out_features, module.in_features))
    blocks = -(-shape.numel() // parameter.blocksize)
    nested = QuantState(
        absmax=torch.empty(-(-blocks // _NESTED_BLOCK)),
        blocksize=_NESTED_BLOCK,
        code=torch.empty(256),
        dtype=torch.float32,
    )
    weight = nn.Parameter(torch.empty((shape.numel() + 1) // 2, 1, dtype=torch.uint8), requires_grad=False)
    attributes = {
        "compress_statistics": parameter.compress_statistics,
        "quant_type": parameter.quant_type,
        "quant_state": QuantState(
            absmax=torch.empty(blocks, dtype=torch.uint8),
            shape=shape,
            code=torch.empty(16),
            blocksize=parameter.blocksize,
            quant_type=parameter.quant_type,
            dtype=module.compute_dtype,
            offset=torch.empty(()),
            state2=nested,
        ),
    }
    for name, value in attributes.items():
        setattr(weight, name, value)
    return weight


def empty_8bit_state(module: Any) -> None:
    """Let an 8-bit layer of bitsandbytes look as after its first forward pass; other modules stay as they are."""
    if hasattr(module, "init_8bit_state"):
        module.state.CB, module.state.SCB = module.weight.data, torch.empty(module.out_features)
        module.weight.CB = module.weight.SCB = None
        module.state.threshold = 0.0  # how many columns are outliers depends on the data; they are few
