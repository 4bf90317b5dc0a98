"""How much of a model was packed: bitsandbytes packs linear layers, and some models keep their weights elsewhere."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from lora_rt.core.base.fused import PackedMatrices
from lora_rt.core.base.precision import QUANTIZED

_MOST = 0.9  # of the blocks' weights: where more is packed, there is nothing to say


def packed_share(model: Any) -> tuple[float, list[str]]:
    """The share of the weights outside embedding and head that is packed, and what keeps the most of the rest.

    Biases and norms are not counted. Of what is left dense, at most three names, the largest first.
    """
    ends = {id(end) for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None}
    packed = 0
    dense: dict[str, int] = {}
    for name, module in model.named_modules():
        if id(module) in ends:
            continue
        if isinstance(module, PackedMatrices):
            packed += module.numel()
        for key, parameter in module.named_parameters(recurse=False):
            if hasattr(parameter, "quant_state") or hasattr(parameter, "CB"):
                packed += int(module.out_features) * int(module.in_features)
            elif parameter.dim() > 1:
                what = _called(name, key, module)
                dense[what] = dense.get(what, 0) + parameter.numel()
    total = packed + sum(dense.values())
    return (packed / total if total else 0.0), sorted(dense, key=dense.__getitem__, reverse=True)[:3]


def remark(model: Any, precision: str) -> str | None:
    """What a quantized base is in fact, for one line; None where it is what its precision says."""
    if precision not in QUANTIZED:
        return None
    share, left = packed_share(model)
    if share >= _MOST:
        return None
    dtype = str(next(p.dtype for p in model.parameters() if p.is_floating_point())).removeprefix("torch.")
    stay = f"{', '.join(left)} stay {dtype}" if left else f"the rest stays {dtype}"
    return f"{precision}: {share:.0%} of the weights; {stay}"


def _called(name: str, key: str, module: nn.Module) -> str:
    """What people call it: the experts, or the last part of the layer's name."""
    whole = f"{name}.{key}"
    if re.search(r"(^|\.)experts\.", whole):
        return "the experts"
    return name.rpartition(".")[2] or key
