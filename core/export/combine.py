"""One pair of factors per layer for a whole composition.

    sum_k w_k B_k A_k  =  [ w_1 B_1 | ... | w_K B_K ] [ A_1 ; ... ; A_K ]

Exact: the ranks of the adapters lie side by side, and each weight, with the adapter's own scaling, is folded into B.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lora_rt.core.engine.stack import Factors
from lora_rt.core.engine.topology import block_number
from lora_rt.core.export import ExportError
from lora_rt.core.export.outline import Outline
from lora_rt.core.export.terms import ExportTerm


def combine(terms: Sequence[ExportTerm], base: Outline) -> dict[str, Factors]:
    """Module -> its factors, in the base's order; modules on which nothing acts are left out.

    Raises:
        ExportError: nothing acts anywhere.
    """
    found = {module: factors for module in base.linears if (factors := _at(module, terms)) is not None}
    if not found:
        raise ExportError("every weight of this composition is 0: that is the base", next_step="Give a term a weight")
    return found


def acting_at(module: str, terms: Sequence[ExportTerm]) -> list[tuple[Factors, float]]:
    """The factors that act at a module, each with its weight there; none whose weight is 0."""
    block = block_number(module)
    return [
        (factors, weight)
        for term in terms
        if (factors := term.adapter.factors.get(module)) is not None and (weight := term.weight_in(block)) != 0.0
    ]


def _at(module: str, terms: Sequence[ExportTerm]) -> Factors | None:
    acting = acting_at(module, terms)
    if not acting:
        return None
    biases = [factors.bias * weight for factors, weight in acting if factors.bias is not None]
    return Factors(
        a=torch.cat([factors.a for factors, _ in acting]),
        b=torch.cat([factors.b * weight for factors, weight in acting], dim=1),
        bias=torch.stack(biases).sum(0) if biases else None,
    )


def rounded(factors: Mapping[str, Factors], dtype: torch.dtype) -> dict[str, Factors]:
    """The factors in another dtype.

    Raises:
        ExportError: values that the dtype can't hold; every such layer is named.
    """
    found = {
        module: Factors(item.a.to(dtype), item.b.to(dtype), None if item.bias is None else item.bias.to(dtype))
        for module, item in factors.items()
    }
    refuse_overflow([(module, tensor) for module, item in found.items() for tensor in _tensors(item)], dtype)
    return found


def refuse_overflow(tensors: Sequence[tuple[str, Tensor]], dtype: torch.dtype) -> None:
    """Raises ExportError where values became infinite in this dtype."""
    beyond = list(dict.fromkeys(name for name, tensor in tensors if not bool(torch.isfinite(tensor).all())))
    if beyond:
        raise ExportError(
            f"{len(beyond)} layers have values that {str(dtype).removeprefix('torch.')} can't hold",
            next_step="Use --dtype float32 or bfloat16",
            problems=beyond,
        )


def _tensors(item: Factors) -> list[Tensor]:
    return [tensor for tensor in (item.a, item.b, item.bias) if tensor is not None]
