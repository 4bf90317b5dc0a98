"""An independent oracle over any base, quantized ones too, on any device: the dense change added to a layer's output.

`copy.copy` of a model shares its layers; hooks on them add (x @ (B A)^T) in float32 and round once, as no code of the
product does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from support.tiny import deltas

Gated = Callable[[str, Tensor, Tensor], Tensor]
"""(name of a layer, x (tokens, in), change of its weight (out, in)) -> what an adapter adds to it (tokens, out)."""
Term = tuple[Path, float | Gated]


def summed_logits(model: Any, base: Path, rows: Sequence[Sequence[Term]], ids: Tensor) -> Tensor:
    """The logits (rows, tokens, vocab), float32, of a model whose row i is under the terms `rows[i]`.

    Args:
        model: loaded by anybody; no plan may be running.
        base: its folder.
        rows: per row, adapters and their weights; in place of a number, what computes the whole addition.
        ids: (rows, tokens), on the model's device.
    """
    sites: dict[str, list[tuple[int, Tensor, Tensor | None, float | Gated]]] = {}
    for row, terms in enumerate(rows):
        for adapter, weight in terms:
            for name, (change, bias) in deltas(base, adapter).items():
                moved = None if bias is None else bias.to(ids.device)
                sites.setdefault(name, []).append((row, change.to(ids.device), moved, weight))

    def adds(name: str) -> Callable[..., Tensor]:
        def hook(_module: Any, given: tuple[Tensor, ...], out: Tensor) -> Tensor:
            x, whole = given[0].float(), out.float()
            for row, change, bias, weight in sites[name]:
                if callable(weight):
                    whole[row] += weight(name, x[row], change)
                else:
                    whole[row] += weight * (x[row] @ change.T + (0.0 if bias is None else bias))
            return whole.to(out.dtype)

        return hook

    handles = [model.get_submodule(name).register_forward_hook(adds(name)) for name in sites]
    try:
        with torch.inference_mode():
            logits: Tensor = model(input_ids=ids).logits
    finally:
        for handle in handles:
            handle.remove()
    return logits.float()


def close(found: Tensor, wanted: Tensor, base: Tensor, *, exact: bool) -> None:
    """That logits are the wanted ones, to rounding, as a share of how far these are from the base's.

    In few bits a sum is rounded elsewhere than in the oracle, layer by layer; it may not be wrong.
    """
    change = (wanted.float() - base.float()).abs()
    off = (found.float() - wanted.float()).abs()
    assert change.max() > 0.5, "the adapters do something"
    most, mean = (1e-3, 1e-4) if exact else (0.1, 0.08)
    assert off.max() <= most * change.max(), f"off by {off.max() / change.max():.4f} of the change"
    assert off.mean() <= mean * change.mean(), f"off by {off.mean() / change.mean():.4f} of the change on the average"


def weights_of(rows: Sequence[Sequence[tuple[Path, float]]]) -> list[Mapping[str, float]]:
    """The same rows as a bank's plan takes them."""
    return [{adapter.name: weight for adapter, weight in row} for row in rows]
