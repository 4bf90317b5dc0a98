"""transformers' Trainer with the mode's loss, a batch in parts, and a stop at the first bad number."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from lora_rt.core.step.loss import batch_loss, is_plain
from lora_rt.core.step.settings import SettingsError
from lora_rt.core.training.processes import joined
from lora_rt.core.training.upstream import LengthGroupedTrainer
from lora_rt.errors import LoraRtError
from lora_rt.plugins.contract import IGNORE, Encoded, Objective
from lora_rt.plugins.manager import PluginError

if TYPE_CHECKING:
    from lora_rt.core.training.checkpoints import Checkpoints


class TrainingDivergedError(LoraRtError):
    """The loss is not a finite number. Nothing of the run is published."""


class Sequences(torch.utils.data.Dataset[dict[str, Any]]):
    """Encoded sequences as the Trainer wants them; "length" lets the sampler batch those of like length."""

    def __init__(self, encoded: Sequence[Encoded]) -> None:
        self._encoded = encoded

    def __len__(self) -> int:
        return len(self._encoded)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.row(self._encoded[index])

    @staticmethod
    def row(item: Encoded) -> dict[str, Any]:
        """One sequence as the collator takes it."""
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


class RankGates:
    """Applies the objective's gates on the rank axis, of which PEFT knows none: each multiplies what A gives.

    Outside of `over`, every gate is 1.
    """

    def __init__(self, model: nn.Module, objective: Objective, rank: int) -> None:
        self._objective = objective
        self._rank = rank
        self._gate: Tensor | None = None
        for module in model.modules():
            if isinstance(module, LoraLayer):
                for a in module.lora_A.values():
                    a.register_forward_hook(self._multiply)

    def acting(self) -> bool:
        """Whether a gate stands now."""
        return self._gate is not None

    @contextmanager
    def over(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Within the block, forward passes of this batch run under its gate."""
        gate = self._objective.ranks(inputs.get("extra", {}), self._rank)
        self._gate = None if gate is None else gate[:, None, :]  # (batch, 1, rank): the same for every token
        try:
            yield
        finally:
            self._gate = None

    def _multiply(self, _module: nn.Module, _arguments: Any, hidden: Tensor) -> Tensor:
        """hidden (batch, tokens, rank)."""
        return hidden if self._gate is None else hidden * self._gate.to(hidden.dtype)


class ModeTrainer(LengthGroupedTrainer):
    """Asks the objective for the loss of each batch, and runs it in as many parts as the memory wants.

    The parts are ours and not the Trainer's: its accumulation takes the mean of their means, and counts its steps and
    groups its sequences by them. Here a step is a step, whatever it is run in.
    """

    def __init__(
        self,
        *args: Any,
        objective: Objective,
        mode: str,
        gates: RankGates,
        checkpoints: Checkpoints,
        accumulation: int = 1,
        packed: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.checkpoints = checkpoints
        self.objective = objective
        self.mode = mode
        self.gates = gates
        self.accumulation = accumulation
        self.packed = packed

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """The gradients of one batch; gives its loss.

        Raises:
            TrainingDivergedError: the loss is NaN or infinite.
        """
        model.train()
        processes = joined()
        whole = self._prepare_inputs(inputs)
        parts = split(whole, -(-self.args.train_batch_size // (self.accumulation * processes.count)))
        counts = [(part["labels"][:, 1:] != IGNORE).sum() for part in parts]
        shares = [count / sum(counts).clamp(min=1) for count in counts] if len(parts) > 1 else [None]
        if processes.count > 1:  # else all would drop the same places
            torch.manual_seed((self.args.seed * 1_000_003 + self.state.global_step) * processes.count + processes.rank)
        nothing = (parts[0], torch.zeros((), device=whole["labels"].device))
        mine = processes.mine(list(zip(parts, shares, strict=True)), nothing)
        losses = [self._backward(model, part, share) for part, share in mine]
        loss = torch.stack(losses).sum() if losses else torch.zeros((), device=whole["labels"].device)
        return self._together(model, loss)

    def _together(self, model: nn.Module, loss: Tensor) -> Tensor:
        """Add up gradients and losses of all processes, which also agree on whether somebody was asked to stop.

        Raises:
            TrainingDivergedError: the loss of one of them is NaN or infinite.
        """
        processes = joined()
        if processes.count == 1:
            self.checkpoints.interrupted = self.checkpoints.asked
            self._check(loss)
            return loss
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        facts = torch.stack([loss, loss.new_tensor(float(self.checkpoints.asked))])
        flat = processes.summed(torch.cat([facts, *(g.float().flatten() for g in gradients)]))
        pieces = flat[2:].split([p.numel() for p in trained])  # type: ignore[no-untyped-call]
        for parameter, summed in zip(trained, pieces, strict=True):
            parameter.grad = summed.view_as(parameter).to(parameter.dtype)
        self.checkpoints.interrupted = bool(flat[1] > 0)
        self._check(flat[0])
        return flat[0]

    def _backward(self, model: nn.Module, part: Mapping[str, Any], share: Tensor | None) -> Tensor:
        """Add the gradients of one part of a batch, of which it has that share of the labels; gives its loss.

        A function of its own, so that nothing of one part's graph is alive when the next one is run.
        """
        # The gates stand until the backward pass is over: checkpointing runs the forward pass again in it.
        with self.gates.over(part):
            loss = batch_loss(model, part, self.objective, packed=self.packed and not self.gates.acting())
            if share is not None:
                loss = loss * share
            if not loss.requires_grad:  # at the first step: a model that cuts the graph off (Reformer)
                text = "no gradient reaches the adapter, for the base's own code cuts it off: it can't be trained"
                raise SettingsError(text, next_step="Name other layers with --target-modules, or use another base")
            with self._blaming():
                self.accelerator.backward(loss)
        return loss.detach().float()

    def _check(self, loss: Tensor) -> None:
        if not math.isfinite(loss.item()):
            whose = "the loss" if is_plain(self.objective) else f"the own loss of the mode {self.mode!r}"
            step = self.state.global_step + 1
            raise TrainingDivergedError(
                f"{whose} became {loss.item()} at step {step}; the run is stopped and nothing is published",
                next_step="Try a smaller --lr, or another --precision",
            )

    @contextmanager
    def _blaming(self) -> Iterator[None]:
        """What fails in the backward pass of a mode's own loss is the mode's doing."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            if is_plain(self.objective):
                raise
            text = f"the loss of the mode {self.mode!r} has no gradient: {str(error).splitlines()[0]}"
            raise PluginError(text, next_step="Report it to the author of its plugin") from error


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
