"""Root mean square norms on a CPU, while a model trains: y = w x / rms(x), with few passes over the numbers.

transformers writes such a norm as a handful of products, each of which autograd answers with others; here a step back
takes as many passes as the mathematics needs. A norm that does something else (Gemma's adds one to its weight) stays.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_NEAR = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def lean_norms(model: nn.Module) -> int:
    """Let the frozen norms of a model on a CPU be computed that way, where that comes to the same; how many do."""
    norms = {norm: eps for norm in model.modules() if (eps := _eps(norm)) is not None and _is_plain(norm, eps)}
    for norm, eps in norms.items():
        norm.forward = partial(_forward, norm.forward, norm, eps)
    return len(norms)


def _eps(norm: nn.Module) -> float | None:
    found = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return found if isinstance(found, float) else None


def _is_plain(norm: nn.Module, eps: float) -> bool:
    weight = getattr(norm, "weight", None)
    if not type(norm).__name__.endswith("RMSNorm") or "forward" in vars(norm) or not isinstance(weight, nn.Parameter):
        return False
    if weight.ndim != 1 or weight.requires_grad or not weight.is_cpu or weight.dtype not in _NEAR:
        return False
    width, near = len(weight), _NEAR[weight.dtype]
    x = torch.linspace(-2, 3, 2 * width).view(2, width).to(weight.dtype)
    with torch.no_grad():
        try:
            wanted = norm(x)
        except (TypeError, ValueError, RuntimeError):  # it takes something else besides
            return False
        found = _Norm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    alike = isinstance(wanted, Tensor) and wanted.dtype == found.dtype and wanted.shape == found.shape
    return alike and torch.allclose(found, wanted, rtol=near, atol=near)


def _forward(own: Any, norm: Any, eps: float, x: Tensor, *further: Any, **options: Any) -> Tensor:
    """y of x, both (..., width)."""
    weight = norm.weight  # asked each time: FSDP puts another one there
    if further or options or x.dtype != weight.dtype or not x.is_cpu:
        return own(x, *further, **options)  # type: ignore[no-any-return]
    return _Norm.apply(x, weight, eps)  # type: ignore[no-untyped-call,no-any-return]


class _Norm(torch.autograd.Function):
    """x and y (..., width) in the dtype of the weight (width,); the arithmetic between them in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        inverse = torch.linalg.vecdot(wide, wide).div_(x.shape[-1]).add_(eps).rsqrt_()[..., None]
        ctx.save_for_backward(x, weight, inverse)
        y: Tensor = (wide * inverse).to(x.dtype).mul_(weight)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        wide, grad = x.float(), grads[0].float() * weight.float()
        along = torch.linalg.vecdot(grad, wide)[..., None].mul_(inverse**3).div_(-x.shape[-1])
        return grad.mul_(inverse).addcmul_(wide, along).to(x.dtype), None, None
