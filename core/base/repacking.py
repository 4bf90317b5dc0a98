"""bitsandbytes repacks 4-bit weights in place at their first forward on a CPU, for a faster kernel. Not always wanted.

Whether a layer is repacked has to be settled before its first forward pass.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

_ROWS = 32  # of the kernel's blocks of output features; bitsandbytes asserts that they come out even


def forbid_repacking(model: nn.Module) -> None:
    """Keep every weight in the layout whose matmul has a gradient.

    Otherwise the first evaluation in eval mode repacks them, and training goes on without a gradient and without an
    error.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010  # torch types attributes as tensors


def forbid_uneven_repacking(model: nn.Module) -> None:
    """Keep the weights whose sizes the repacking does not allow for: it fails, in the middle of a forward pass."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu") and isinstance(module, nn.Linear):
            block = getattr(getattr(module.weight, "quant_state", None), "blocksize", 1)
            if module.out_features % _ROWS or module.in_features % block:
                forbid_repacking(module)


def over_the_same_weights(model: Any) -> Any:
    """A copy of a model's modules over the very same parameters, buffers and quantization scales.

    Weights that are repacked on a CPU in a model's first pass are each model's own: whoever came later would find them
    packed, and could multiply them in no other way.
    """
    shared: list[Any] = [*model.parameters(), *model.buffers(), model.config, model.generation_config]
    shared += [p.quant_state for p in model.parameters() if getattr(p, "quant_state", None) is not None]
    made = copy.deepcopy(model, memo={id(thing): thing for thing in shared})
    for layer in made.modules():
        if getattr(layer, "support_avx512bf16_for_cpu", False) and layer.weight.device.type == "cpu":
            layer.weight = copy.deepcopy(layer.weight)
            layer.quant_state = layer.weight.quant_state  # bitsandbytes keeps the scales in both
    return made
