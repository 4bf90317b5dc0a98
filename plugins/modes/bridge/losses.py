"""Losses of texts under a runtime, and intervals of their means."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from lora_rt import Composition, Runtime

_ROWS, _RAW_ROWS, _RESAMPLES = 16, 8, 2000


@dataclass(frozen=True, slots=True)
class TextLosses:
    """Per example: the summed negative log-likelihood of its text in nats, and its tokens; both (examples,)."""

    sums: NDArray[np.float64]
    tokens: NDArray[np.int64]

    @property
    def mean(self) -> float:
        """Nats per token over all examples."""
        return float(self.sums.sum() / self.tokens.sum())


def text_losses(
    runtime: Runtime, examples: Sequence[Mapping[str, Any]], composition: Composition | str | None
) -> TextLosses:
    """The loss of every example's "text" after its "scene" as the prompt; rows of like length share a batch."""
    sums, tokens = np.zeros(len(examples)), np.zeros(len(examples), dtype=np.int64)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["text"]))
    for start in range(0, len(order), _ROWS):
        rows = order[start : start + _ROWS]
        pairs = [examples[i]["scene"] for i in rows], [examples[i]["text"] for i in rows]
        for i, loss in zip(rows, runtime.answer_nll(*pairs, composition), strict=True):
            sums[i], tokens[i] = float(loss.sum()), len(loss)
    return TextLosses(sums, tokens)


def raw_losses(runtime: Runtime, texts: Sequence[str]) -> NDArray[np.float64]:
    """The summed negative log-likelihood in nats of each text under the base, as the beginning of a document; (texts,).

    The text follows the token that begins a document, or ends one where the tokenizer has none.
    """
    import torch
    from torch.nn.functional import cross_entropy

    tokenizer = runtime.tokenizer
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    rows = [[int(first), *tokenizer(text, add_special_tokens=False).input_ids] for text in texts]
    losses = np.zeros(len(rows))
    for start in range(0, len(rows), _RAW_ROWS):
        batch = rows[start : start + _RAW_ROWS]
        width = max(len(row) for row in batch)
        ids = torch.tensor([row + [row[0]] * (width - len(row)) for row in batch])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch])
        logits = runtime.logits(ids, mask)[:, :-1].flatten(0, 1).float().cpu()
        nll = cross_entropy(logits, ids[:, 1:].flatten(), reduction="none").view(len(batch), -1)
        losses[start : start + len(batch)] = (nll * mask[:, 1:]).sum(1).numpy()
    return losses


def interval(sums: NDArray[np.float64], counts: NDArray[np.int64]) -> tuple[float, float]:
    """The 95% percentile bootstrap interval (Efron 1979) of sum(sums) / sum(counts) over examples."""
    rows = np.random.default_rng(0).integers(0, len(sums), size=(_RESAMPLES, len(sums)))
    low, high = np.quantile(sums[rows].sum(1) / counts[rows].sum(1), [0.025, 0.975])
    return float(low), float(high)
