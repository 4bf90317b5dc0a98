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
from lora_rt.core.training.settings import SettingsError
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
    """Asks the objective for the loss of each batch, and runs it in as many parts as the memory wants.

    The parts are ours and not the Trainer's: its accumulation takes the mean of their means, and counts its steps and
    groups its sequences by them. Here a step is a step, whatever it is run in.
    """

    def __init__(
        self, *args: Any, objective: Objective, gates: RankGates, accumulation: int = 1, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.objective = objective
        self.gates = gates
        self.accumulation = accumulation

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGrouped:
        rows = self.train_dataset
        lengths = [rows[index]["length"] for index in range(len(rows))]
        return LengthGrouped(lengths, self.args.train_batch_size, self.args.seed)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The gradients of one batch; gives its loss.

        Raises:
            TrainingDivergedError: the loss is NaN or infinite.
        """
        model.train()
        whole = self._prepare_inputs(inputs)
        parts = split(whole, -(-self.args.train_batch_size // self.accumulation))
        counts = [(part["labels"][:, 1:] != IGNORE).sum() for part in parts]
        shares = [count / sum(counts).clamp(min=1) for count in counts] if len(parts) > 1 else [None]
        losses = [self._backward(model, part, share) for part, share in zip(parts, shares, strict=True)]
        return torch.stack(losses).sum()

    def _backward(self, model: nn.Module, part: Mapping[str, Any], share: Tensor | None) -> Tensor:
        """Add the gradients of one part of a batch, of which it has that share of the labels; gives its loss.

        A function of its own, so that nothing of one part's graph is alive when the next one is run.
        """
        # The gates stand until the backward pass is over: checkpointing runs the forward pass again in it.
        with self.gates.over(part):
            loss = batch_loss(model, part, self.objective)
            if share is not None:
                loss = loss * share
            self._check(loss)
            self.accelerator.backward(loss)
        return loss.detach().float()

    def _check(self, loss: Tensor) -> None:
        if not math.isfinite(loss.item()):
            step = self.state.global_step + 1
            raise TrainingDivergedError(
                f"the loss became {loss.item()} at step {step}; the run is stopped and nothing is published",
                next_step="Try a smaller --lr, or another --precision",
            )


def split(batch: Mapping[str, Any], rows: int) -> list[dict[str, Any]]:
    """A batch in parts of at most so many rows, each without the padding that only the other parts need."""
    if len(batch["labels"]) <= rows:
        return [dict(batch)]
    parts = []
    for start in range(0, len(batch["labels"]), rows):
        some = slice(start, start + rows)
        tokens = int(batch["attention_mask"][some].sum(1).max())
        part = {key: value[some, :tokens] for key, value in batch.items() if key != "extra"}
        if "extra" in batch:
            part["extra"] = {key: value[some] for key, value in batch["extra"].items()}
        parts.append(part)
    return parts


def checkpointed(model: Any) -> None:
    """Let every block keep its input alone and run again in the backward pass.

    Raises:
        SettingsError: the model can't.
    """
    base = model.get_base_model()
    if not base.supports_gradient_checkpointing:
        text = f"{type(base).__name__} has no gradient checkpointing"
        raise SettingsError(text, next_step="Use --no-gradient-checkpointing and a smaller --batch-size")
    base.activation_checkpointing_enable({"use_reentrant": False})
    # transformers asks for the embeddings' gradients too, which only the reentrant kind of checkpoint needs.
    base.disable_input_require_grads()


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
    return nll_at(model, inputs, (inputs["labels"][:, 1:] != IGNORE).any(0).nonzero().flatten())


def nll_at(model: nn.Module, inputs: Mapping[str, Any], columns: Tensor) -> tuple[Tensor, Tensor]:
    """The same, where the columns (of the labels without the first) are known; (columns,) int64."""
    arguments = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}
    if _keeps_logits(model):
        logits = model(**arguments, logits_to_keep=columns).logits
    else:
        logits = model(**arguments).logits[:, columns]
    kept = inputs["labels"][:, 1:][:, columns]
    losses = cross_entropy(logits.flatten(0, 1).float(), kept.flatten(), ignore_index=IGNORE, reduction="none")
    return losses.view(kept.shape).sum(1), (kept != IGNORE).sum(1)


def _keeps_logits(model: Any) -> bool:
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(inner.forward).parameters
