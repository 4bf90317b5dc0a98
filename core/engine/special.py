"""What an adapter may hold besides A and B, in terms of A and B where that is exact.

DoRA (arXiv:2402.09353)    W' = m / |W + sBA| * (W + sBA), row by row. With c = m / |W + sBA|:

    W' x = W x + (c - 1) * (W x) + c * (sB) A x        so that a weighted sum of several is the dense sum of W' - W

an embedding's factors      A looks up its columns instead of being multiplied; the embedding's scale lies in B
trained token rows          E' = E + (T - E) at these rows: A is 1 at each token, B is (T - E)^T; turned for a tied head
a trained bias              the difference from the base's
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lora_rt.core.base.upstream import own_tensors
from lora_rt.core.engine.plan import base_alone
from lora_rt.core.engine.stack import Factors

_CHUNK = 1024  # inputs that are sent through a layer at once, to see its weight


@dataclass(frozen=True, slots=True, eq=False)
class TokenRows:
    """Rows of an embedding that were trained: token ids (k,) and what they became (k, n)."""

    ids: Tensor
    values: Tensor


def rescaled(factors: Factors, module: nn.Module) -> Factors:
    """DoRA's factors over a layer: B times c, and c - 1 as the scale."""
    assert factors.magnitude is not None
    weight = dense_weight(module).float()
    magnitude, a, b = (tensor.to(weight.device).float() for tensor in (factors.magnitude, factors.a, factors.b))
    c = magnitude / (weight + b @ a).norm(dim=1)
    return replace(factors, b=b * c[:, None], magnitude=None, scale=c - 1)


def dense_weight(module: Any) -> Tensor:
    """The weight (out, in) of a linear layer of any kind: where it is packed, what the layer makes of each input."""
    weight = getattr(module, "weight", None)
    if isinstance(weight, Tensor) and weight.dim() == 2 and not hasattr(weight, "__tensor_flatten__"):
        dense = weight.detach()
        if dense.is_floating_point() and dense.dtype.itemsize > 1:
            return dense if isinstance(module, (nn.Linear, nn.Embedding)) else dense.T
    own = next(tensor for tensor in [*module.parameters(), *module.buffers()])
    dtype = getattr(module, "compute_dtype", None) or torch.float32
    with torch.no_grad(), base_alone():
        zero = module(torch.zeros(1, module.in_features, device=own.device, dtype=dtype)).float()
        eye = torch.eye(module.in_features, device=own.device, dtype=dtype)
        parts = [eye[start : start + _CHUNK] for start in range(0, len(eye), _CHUNK)]
        return torch.cat([module(part).float() - zero for part in parts]).T


def embedded(factors: Factors, module: Any) -> Factors:
    """An embedding's factors, times its own scale (Gemma)."""
    scale = getattr(module, "embed_scale", 1.0)
    return replace(factors, b=factors.b * (scale.to(factors.b) if isinstance(scale, Tensor) else scale))


def of_tokens(rows: TokenRows, module: nn.Module) -> Factors:
    """The factors that turn an embedding's rows into the trained ones; for a head they are `turned`."""
    own = dense_weight(module)
    change = rows.values.float().to(own.device) - own[rows.ids.to(own.device)].float()
    picks = torch.zeros(len(rows.ids), len(own), device=own.device)
    picks[torch.arange(len(rows.ids)), rows.ids] = 1.0
    return Factors(picks, change.T)


def turned(factors: Factors) -> Factors:
    """The same change for the head that is tied to the embedding."""
    return Factors(factors.b.T, factors.a.T)


def of_bias(bias: Tensor, module: Any, in_features: int) -> Factors:
    """A trained bias as the difference from the layer's own."""
    own = module.bias
    change = bias.float() if own is None else bias.float().to(own.device) - own.detach().float()
    nothing = change.new_zeros(0)
    return Factors(nothing.view(0, in_features), nothing.view(len(change), 0), change)


def side_by_side(one: Factors | None, other: Factors) -> Factors:
    """Both at one layer."""
    if one is None:
        return other
    biases = [factors.bias for factors in (one, other) if factors.bias is not None]
    device = one.a.device
    return replace(
        one,
        a=torch.cat([one.a, other.a.to(device)]),
        b=torch.cat([one.b, other.b.to(device)], dim=1),
        bias=sum(bias.to(device) for bias in biases) if biases else None,  # type: ignore[arg-type]
    )


def twin(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A module that computes with other tensors, and shares the rest."""
    made = copy.copy(module)
    vars(made).pop("forward", None)
    made._parameters = dict(own_tensors(module)[0])
    for name, tensor in tensors.items():
        own = own_tensors(module)[0][name]
        assert own is not None
        made._parameters[name] = nn.Parameter(tensor.to(own), requires_grad=False)
    return made
