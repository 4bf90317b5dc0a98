"""The loss of a batch: the mode's own, or the cross entropy of its labels, with logits only where labels are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lora_rt.core.base.shape import ForwardPass
from lora_rt.core.step.packing import Packing
from lora_rt.plugins.contract import IGNORE, Objective


def batch_loss(model: nn.Module, inputs: Mapping[str, Any], objective: Objective, *, packed: bool = False) -> Tensor:
    """The objective's own loss, or the mean cross entropy per labelled token of the batch.

    Args:
        packed: the model attends by rows, and rows without a loss of their objective's own are to be packed.
    """
    labels = inputs["labels"]
    if is_plain(objective):
        total, count = label_nll(model, inputs, packed=packed)
        return total.sum() / count.sum().clamp(min=1)
    logits = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    loss = objective.loss(logits, labels, inputs.get("extra", {}))
    if loss is not None:
        return loss
    return cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORE)


def is_plain(objective: Objective) -> bool:
    """Whether the loss is the runtime's own, and not the mode's."""
    return type(objective).loss is Objective.loss


def label_nll(model: nn.Module, inputs: Mapping[str, Any], *, packed: bool = False) -> tuple[Tensor, Tensor]:
    """Per row: the summed negative log-likelihood of its labels in nats, and how many there are; both (batch,).

    Only the columns in which some row has a label go through the output head: with a vocabulary of 50,000 and a small
    model that is a fifth of the step. Of packed rows it is the labels alone.
    """
    if packed:
        packing = Packing.of(inputs)
        logits = model(**packing.arguments(ForwardPass.of(model))).logits[0]
        losses = cross_entropy(logits.float(), packing.labels, reduction="none")
        rows = losses.split(packing.counts.tolist())  # type: ignore[no-untyped-call]
        return torch.stack([row.sum() for row in rows]), packing.counts
    return nll_at(model, inputs, (inputs["labels"][:, 1:] != IGNORE).any(0).nonzero().flatten())


def nll_at(model: nn.Module, inputs: Mapping[str, Any], columns: Tensor) -> tuple[Tensor, Tensor]:
    """The same, where the columns (of the labels without the first) are known; (columns,) int64."""
    forward = ForwardPass.of(model)
    arguments = forward.arguments(inputs["input_ids"], inputs["attention_mask"], columns)
    logits = forward.kept(model(**arguments).logits, columns)
    kept = inputs["labels"][:, 1:][:, columns]
    losses = cross_entropy(logits.flatten(0, 1).float(), kept.flatten(), ignore_index=IGNORE, reduction="none")
    return losses.view(kept.shape).sum(1), (kept != IGNORE).sum(1)
