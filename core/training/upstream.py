"""What training takes of transformers' Trainer beyond its documented face; `tests/training/test_upstream.py` holds it.

_get_train_sampler            where the Trainer asks for the order of the rows
get_length_grouped_indices    rows of like length in one batch, the longest first
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_pt_utils import get_length_grouped_indices


class LengthGrouped(torch.utils.data.Sampler[int]):
    """Shuffles, with sequences of like length in one batch; the order is a function of seed and epoch alone.

    transformers' own sampler draws from the global generator, whose state in the middle of an epoch is not that at its
    beginning: a resumed run would go on through another order than the one that it had begun.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths = list(lengths)
        self._batch_size = batch_size
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Called by the training loop at the start of each epoch."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self._epoch)
        return iter(get_length_grouped_indices(self._lengths, self._batch_size, generator=generator))


class LengthGroupedTrainer(Trainer):  # type: ignore[misc]
    """The Trainer, which reads its rows in the order of `LengthGrouped`; each row has a "length"."""

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGrouped:
        rows = self.train_dataset
        lengths = [rows[index]["length"] for index in range(len(rows))]
        return LengthGrouped(lengths, self.args.train_batch_size, self.args.seed)
