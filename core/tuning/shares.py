"""A first state for gates that share out a sum of weights, from what each adapter says alone.

Of a mixture whose adapter k has the share s_k of a token's weights, and would say that token with the chance p_k were
all of the sum its own, -log(sum_k s_k p_k) is a loss that no pass over the base is needed for: the chances and the
early hidden states are worked out once, and hundreds of steps take the time of one batch. It is what shares would be
fitted by if each token were said by one of the adapters (a mixture of experts), and an approximation for adapters whose
weights are added up: what is found here is where the fit by the true loss begins.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from lora_rt.core.base.shape import positions_of
from lora_rt.core.tuning.data import Item, chunks
from lora_rt.core.tuning.frozen import Best, Frozen
from lora_rt.plugins.contract import IGNORE, Gate

STEPS = 150  # over all examples
_RATE = 0.02  # Adam's
_ROUNDING = 1e-5  # gradients so small are rounding: of what multiplies all shares alike there is none
_JUDGED = 10  # steps
_ROWS = 32

Gates = Callable[[Sequence[Item], Tensor], Mapping[str, Gate | None]]
"""Of a batch and its early hidden states (rows, tokens, hidden): the gates with the weights in them."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Examples, their early hidden states (rows, tokens, hidden), which tokens are followed by one of an answer
    (rows, tokens), and the logarithm of the chance that each adapter alone gives that one (answer tokens, adapters).
    """

    items: Sequence[Item]
    hidden: Tensor
    asked: Tensor
    chances: Tensor


def batches(frozen: Frozen, items: Sequence[Item], start: Mapping[str, float], depth: int | None) -> list[Batch]:
    """What one pass of every adapter over the examples shows; each has the sum of all weights, and its own sign."""
    most = sum(map(abs, start.values()))
    ordered = sorted(items, key=lambda item: len(item.prompt) + len(item.answer))
    made = []
    with torch.no_grad():
        for some in chunks(ordered, _ROWS):
            ids, mask, labels = frozen.tensors(some)
            asked = pad(labels[:, 1:] != IGNORE, (0, 1))
            hidden = frozen.early(ids, mask, positions_of(mask), depth).clone()
            alone = [{name: most if weight > 0 else -most} for name, weight in start.items()]
            chances = torch.stack([-frozen.losses(some, [weights], {})[asked[:, :-1]] for weights in alone], -1)
            made.append(Batch(some, hidden, asked, chances))
    return made


def fit(
    state: Sequence[Tensor],
    start: Sequence[float],
    gates: Gates,
    learned: Sequence[Batch],
    aside: Sequence[Batch],
    keep: float,
    advance: Callable[[float], None],
) -> None:
    """Bring `state`, whose tensors require gradients, to what is best on `aside` in some steps over all of `learned`.

    Args:
        start: the weights of the static composition.
        gates: under the state as it is.
        keep: the weight of the mean squared distance of the shares from those of the start, as multiples of these.
        advance: hears the loss of each step, nats per token.
    """
    even = torch.tensor(start, device=learned[0].chances.device).abs()
    even = even / even.sum()
    optimizer = torch.optim.Adam(state, lr=_RATE, eps=_ROUNDING)
    count = sum(len(batch.chances) for batch in learned)
    best = Best(state, lambda: _mean(gates, aside))
    for number in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for batch in learned:
            shares = _shares(gates, batch)
            loss = _loss(shares, batch)
            distance = (shares / even - 1).square().sum()
            ((loss + keep * distance) / count).backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        optimizer.step()
        advance(total / count)
        if number % _JUDGED == _JUDGED - 1:
            best.look()
    best.restore()


def _mean(gates: Gates, some: Sequence[Batch]) -> float:
    with torch.no_grad():
        losses = [float(_loss(_shares(gates, batch), batch)) for batch in some]
    return sum(losses) / sum(len(batch.chances) for batch in some)


def _shares(gates: Gates, batch: Batch) -> Tensor:
    """(answer tokens, adapters), of which each token's are 1 together."""
    parts = []
    for gate in gates(batch.items, batch.hidden).values():
        ranks = None if gate is None else gate.ranks
        assert ranks is not None  # the weight is in it
        ranks = ranks.abs()[(None,) * (4 - ranks.dim())]  # (layers, rows, tokens, rank), each of them perhaps 1
        parts.append(ranks.mean((0, 3)).expand(batch.asked.shape)[batch.asked])
    weights = torch.stack(parts, -1)
    return weights / weights.sum(-1, keepdim=True)


def _loss(shares: Tensor, batch: Batch) -> Tensor:
    """Summed over a batch, in nats."""
    tiny = torch.finfo(torch.float32).tiny  # of a hard choice the others are 0
    return -(shares.clamp(min=tiny).log() + batch.chances.to(shares)).logsumexp(-1).sum()
