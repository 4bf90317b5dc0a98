"""transformers' Trainer with the mode's loss: logits only where labels are, and a stop at the first bad number."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer
from transformers.trainer_pt_utils import get_length_grouped_indices

from lora_rt.core.training.ranks import RankGates
from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import IGNORE, Encoded, Objective


class TrainingDivergedError(LoraRtError):
    """The loss is not a finite number. Nothing of the run is published."""


class Sequences(torch.utils.data.Dataset[dict[str, Any]]):
    """Encoded sequences as the Trainer wants them; "length" lets the sampler batch those of like length."""

    def __init__(self, encoded: Sequence[Encoded]) -> None:
        self._encoded = encoded

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self._encoded[index]
        return {
            "input_ids": torch.tensor(item.input_ids),
            "labels": torch.tensor(item.labels),
            "length": len(item.input_ids),
            "extra": item.extra,
        }


class Collator:
    """Pads a batch on the right; `extra` becomes one (batch,) tensor per key."""

    def __init__(self, pad_id: int) -> None:
        self._pad_id = pad_id

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        ids = [item["input_ids"] for item in items]
        batch = {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self._pad_id),
            "attention_mask": pad_sequence([torch.ones_like(i) for i in ids], batch_first=True),
            "labels": pad_sequence([item["labels"] for item in items], batch_first=True, padding_value=IGNORE),
        }
        extra = {key: torch.tensor([item["extra"][key] for item in items]) for key in items[0]["extra"]}
        return {**batch, "extra": extra} if extra else batch


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


class ModeTrainer(Trainer):  # type: ignore[misc]
    """Asks the objective for the loss of each batch."""

    def __init__(self, *args: Any, objective: Objective, gates: RankGates, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.objective = objective
        self.gates = gates
        # Our loss is the mean of its own batch, whatever the model would do with `num_items_in_batch`.
        self.loss_is_scaled_for_ga = False
        self.model_accepts_loss_kwargs = False

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGrouped:
        rows = self.train_dataset
        lengths = [rows[index]["length"] for index in range(len(rows))]
        return LengthGrouped(lengths, self.args.train_batch_size, self.args.seed)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean loss of a batch.

        Raises:
            TrainingDivergedError: it is NaN or infinite.
        """
        with self.gates.over(inputs):
            loss = batch_loss(model, inputs, self.objective)
        if not math.isfinite(loss.item()):
            step = self.state.global_step + 1
            raise TrainingDivergedError(
                f"the loss became {loss.item()} at step {step}; the run is stopped and nothing is published",
                next_step="Try a smaller --lr, or another --precision",
            )
        return (loss, None) if return_outputs else loss


def batch_loss(model: nn.Module, inputs: Mapping[str, Any], objective: Objective) -> Tensor:
    """The objective's own loss, or the mean cross entropy per labelled token of the batch."""
    labels = inputs["labels"]
    if type(objective).loss is Objective.loss:
        total, count = label_nll(model, inputs)
        return total.sum() / count.sum().clamp(min=1)
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    loss = objective.loss(logits, labels, inputs.get("extra", {}))
    return plain_loss(logits, labels) if loss is None else loss


def plain_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy per labelled token; logits (batch, tokens, vocab), labels (batch, tokens) unshifted."""
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE)


def label_nll(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Per row: the summed negative log-likelihood of its labels in nats, and how many there are; both (batch,).

    Only the columns in which some row has a label go through the output head: with a vocabulary of 50,000 and a small
    model that is a fifth of the step.
    """
    targets = inputs["labels"][:, 1:]
    columns = (targets != IGNORE).any(0).nonzero().flatten()
    arguments = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
    if _keeps_logits(model):
        logits = model(**arguments, logits_to_keep=columns).logits
    else:
        logits = model(**arguments).logits[:, columns]
    kept = targets[:, columns]
    losses = cross_entropy(logits.flatten(0, 1).float(), kept.flatten(), ignore_index=IGNORE, reduction="none")
    return losses.view(kept.shape).sum(1), (kept != IGNORE).sum(1)


def _keeps_logits(model: Any) -> bool:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
