"""bitsandbytes repacks 4-bit weights in place at their first forward on a CPU, for a faster kernel. Not always wanted.

Whether a layer is repacked has to be settled before its first forward pass.
"""

from __future__ import annotations

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
