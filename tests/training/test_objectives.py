"""Objectives that break their contract end in one line that names the plugin and says what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from lora_rt.core.step.settings import TrainSettings
from lora_rt.core.training.run import train
from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import IGNORE, Encoded, Example, Objective, ObjectiveContext, hookimpl
from lora_rt.registry.store import Store
from support.tiny import mode_host

Make = Callable[..., TrainSettings]
LOSSES: Mapping[str, tuple[Callable[[Tensor], Any], str]] = {
    "without a gradient": (lambda logits: logits.detach().mean(), "a loss without a gradient"),
    "a new tensor": (lambda logits: torch.tensor(1.0), "a loss without a gradient"),
    "complex": (lambda logits: logits.mean() * torch.tensor(1j), "a loss of torch.complex64"),
    "meta": (lambda logits: logits.mean().to("meta"), "a loss on meta, and the logits are on cpu"),
    "NaN": (lambda logits: logits.mean() * float("nan"), "the own loss of the mode 'odd' became nan at step 1"),
    "of two numbers": (lambda logits: logits.mean((0, 1))[:2], "a Tensor of shape (2,), not a scalar tensor"),
    "a text": (lambda logits: "0.5", "it returned a str, not a scalar tensor"),
    "cut off on the way back": (lambda logits: Cut.apply(logits.mean()), "has no gradient: no way back"),
}
SEQUENCES: Mapping[str, tuple[Any, str]] = {
    "none": ([], "the plugin of the mode 'odd' makes no sequence"),
    "of one token": (
        [Encoded([5], [5])],
        "line 1: no token after the first carries loss, and the first is never predicted (1 in all)",
    ),
    "without labels": ([Encoded([5, 6], [IGNORE, IGNORE])], "the mode 'odd' reads them"),
    "labels beyond the vocabulary": ([Encoded([5, 6], [IGNORE, 99999])], "a label is neither its own position's token"),
    "tokens beyond the vocabulary": ([Encoded([5, 99999], [IGNORE, 99999])], "token ids from 0 to 263"),
    "a text": ("abc", "not a list of Encoded"),
    "extras of text": ([Encoded([5, 6], [5, 6], {"x": "y"})], "not numbers by name"),
}


class Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *gradient: Any) -> Any:
        raise RuntimeError("no way back")


def odd(loss: Callable[[Tensor], Any] | None = None, sequences: Any = None, ranks: Any = None) -> Any:
    class Odd(Objective):
        def encode(self, example: Example) -> list[Encoded]:
            found: list[Encoded] = [Encoded([5, 6, 7], [IGNORE, 6, 7])] if sequences is None else sequences
            return found

        def ranks(self, extra: Mapping[str, Tensor], rank: int) -> Tensor | None:
            found: Tensor | None = ranks
            return found

    class WithLoss(Odd):
        def loss(self, logits: Tensor, labels: Tensor, extra: Mapping[str, Tensor]) -> Tensor | None:
            found: Tensor | None = loss(logits) if loss else None
            return found

    class Hooks:
        @hookimpl
        def lora_rt_objective(context: ObjectiveContext) -> Objective:
            return WithLoss() if loss else Odd()

    return mode_host(odd=Hooks)


def refused(settings: TrainSettings, modes: Any) -> str:
    with pytest.raises(LoraRtError) as caught:
        train(settings, modes)
    assert "odd" in str(caught.value)
    assert Store().installed() == []
    return str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("kind", LOSSES)
def test_a_loss_that_nothing_can_be_learned_from_names_the_plugin(settings: Make, kind: str) -> None:
    loss, named = LOSSES[kind]
    assert named in refused(settings(mode="odd"), odd(loss))


@pytest.mark.parametrize("kind", SEQUENCES)
def test_sequences_that_nothing_can_be_learned_from_name_the_plugin(settings: Make, kind: str) -> None:
    sequences, named = SEQUENCES[kind]
    assert named in refused(settings(mode="odd"), odd(sequences=sequences))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "named"),
    [
        (torch.ones(1, 3), "(1, 3)"),
        (torch.ones(1, 4, dtype=torch.int64), "int64"),
        (torch.full((1, 4), torch.inf), "finite"),
    ],
)
def test_gates_on_the_ranks_that_do_not_fit_name_the_plugin(settings: Make, ranks: Tensor, named: str) -> None:
    assert named in refused(settings(mode="odd"), odd(ranks=ranks))
