"""Losses of texts as the beginning of a document: no prompt and no chat template before them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from lora_rt import Runtime

_ROWS = 8


def raw_losses(runtime: Runtime, texts: Sequence[str]) -> NDArray[np.float64]:
    """The summed negative log-likelihood in nats of each text under the base, as the beginning of a document; (texts,).

    The text follows the token that begins a document, or ends one where the tokenizer has none.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from torch.nn.utils.rnn import pad_sequence

    tokenizer = runtime.tokenizer
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    rows = [torch.tensor([int(first), *tokenizer(text, add_special_tokens=False).input_ids]) for text in texts]
    losses = np.zeros(len(rows))
    for start in range(0, len(rows), _ROWS):
        batch = rows[start : start + _ROWS]
        ids, mask = (pad_sequence(part, batch_first=True) for part in (batch, list(map(torch.ones_like, batch))))
        logits = runtime.logits(ids, mask)[:, :-1].flatten(0, 1).float().cpu()
        nll = cross_entropy(logits, ids[:, 1:].flatten(), reduction="none").view(len(batch), -1)
        losses[start : start + len(batch)] = (nll * mask[:, 1:]).sum(1).numpy()
    return losses
