"""Weights for a target, by gradient: one number per adapter, or one per adapter and layer.

LoraHub (Huang et al. 2023) searches such weights without gradients; here the engine's gate is differentiable, so a
few examples and a few dozen steps are enough. Nothing is normalised: weights may become negative or larger than 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lora_rt.core.tuning.data import Item, chunks, held_out, steps
from lora_rt.core.tuning.frozen import Best, Frozen
from lora_rt.core.tuning.settings import TuneSettings, check_loss, check_weights
from lora_rt.plugins.contract import Gate

_EVALUATED = 16


@dataclass(frozen=True, slots=True)
class Tuned:
    """Resident name -> weights, one or one per layer; the losses on held-out examples, in nats per answer token."""

    weights: Mapping[str, Sequence[float]]
    loss_before: float
    loss_after: float
    losses: Sequence[float] = field(default=())


def tune(
    frozen: Frozen,
    start: Mapping[str, float],
    items: Sequence[Item],
    settings: TuneSettings,
    advance: Callable[[float], None] = lambda _loss: None,
) -> Tuned:
    """Fit weights to the examples, of which a tenth is held out; the weights are the best ones seen on that tenth.

    `start` has the first weights by resident name; `advance` hears each step's loss.

    Raises:
        TuneError: the weights, or the loss, are no numbers that can be computed with.
    """
    check_weights(start)
    depth = frozen.base.facts.layers if settings.per == "layer" else 1
    device = frozen.bank.device
    weights = {name: torch.full((depth,), w, device=device, requires_grad=True) for name, w in start.items()}
    optimizer = torch.optim.Adam(weights.values(), lr=settings.learning_rate)
    items, aside = held_out(items, settings.seed)
    batches = list(steps(items, settings.batch_size, settings.epochs, settings.seed))

    def judge() -> float:
        check_weights({name: float(value.detach().abs().max()) for name, value in weights.items()})
        return mean_loss(frozen, aside, weights)

    best = Best(weights.values(), judge)
    losses: list[float] = []
    for batch in best.over(batches):
        total, count = frozen.nll(batch, [dict.fromkeys(weights, 1.0)], _gates(weights))
        loss = total / count
        check_loss(loss, len(losses) + 1)
        distance = torch.stack([(value - start[name]).square().mean() for name, value in weights.items()]).sum()
        optimizer.zero_grad()
        (loss + settings.pull * distance).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
        advance(losses[-1])
    return Tuned({name: value.tolist() for name, value in weights.items()}, best.first, best.last, losses)


def mean_loss(frozen: Frozen, items: Sequence[Item], weights: Mapping[str, Tensor]) -> float:
    """Nats per answer token of all examples."""
    ordered = sorted(items, key=lambda item: len(item.prompt) + len(item.answer))
    return frozen.mean_nll(chunks(ordered, _EVALUATED), lambda _batch: _gates(weights))


def _gates(weights: Mapping[str, Tensor]) -> dict[str, Gate | None]:
    return {name: Gate(ranks=value[:, None, None, None]) for name, value in weights.items()}
