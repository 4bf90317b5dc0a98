"""From an inspected adapter to one in memory: the tensors that the inspection read, with the scaling folded in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lora_rt.core.engine.bank import ResidentAdapter
from lora_rt.core.engine.stack import Factors
from lora_rt.registry.inspection import InspectedAdapter, OwnWeights, RawTensor
from lora_rt.registry.inspection.keys import inner_path

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


def read_adapter(inspected: InspectedAdapter, name: str) -> ResidentAdapter:
    """The factors of every module, B (and a bias) already times alpha/r or alpha/sqrt(r), in float32.

    The inspection was asked to load: its tensors are used, no file is opened again.
    """
    factors: dict[str, Factors] = {}
    tensors = inspected.tensors
    for module in inspected.modules:
        bias = as_tensor(tensors[module.bias_key]).float() * module.scaling if module.bias_key else None
        b = as_tensor(tensors[module.b_key]).float() * module.scaling
        factors[module.module] = Factors(as_tensor(tensors[module.a_key]).float(), b, bias)
    card: Mapping[str, Any] = inspected.card.model_dump() if inspected.card else {}
    state = {key: as_tensor(tensor) for key, tensor in inspected.state.items()}
    return ResidentAdapter(name, factors, inspected.mode, card, state)


def as_tensor(raw: RawTensor) -> Tensor:
    """The tensor over the bytes that were read, which nobody else holds."""
    return torch.from_numpy(raw.data).view(_DTYPES[raw.dtype]).reshape(raw.shape)


def own_weights(model: nn.Module) -> OwnWeights:
    """Compares a tensor of an adapter's file with the model's own, after the cast that made one of them from the other.

    A tied head is found under its own name. A layer that is kept in 4 or 8 bits equals nothing.
    """
    # The same parameter under every name that it has: a tied head is the embedding.
    own: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    inner: dict[str, list[Tensor]] = {}
    for name, parameter in own.items():
        inner.setdefault(inner_path(name), []).append(parameter)

    def compare(name: str, raw: RawTensor) -> bool | None:
        mine: Tensor | None = own.get(name)
        if mine is None:
            same = inner.get(inner_path(name), [])
            if len(same) != 1:
                return None
            mine = same[0]
        given = as_tensor(raw)
        if given.shape != mine.shape or not given.dtype.is_floating_point:
            return False
        kept = mine.detach().cpu()
        return torch.equal(given.to(kept.dtype), kept) or torch.equal(kept.to(given.dtype), given)

    return compare
