"""What a training step takes: gradients, optimizer, and the activations that its backward pass waits for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lora_rt.core.base.choices import Precision
from lora_rt.core.memory.live import LiveMemory
from lora_rt.core.memory.skeleton import (
    bytes_of,
    largest_dequantized,
    materialise,
    over_blocks,
    resident,
    skeleton,
)
from lora_rt.core.memory.upstream import FakeTensorMode, FirstExpert
from lora_rt.core.memory.workload import Device
from lora_rt.core.step.adapter import checkpointed, with_adapter
from lora_rt.core.step.attention import attend_in_float32
from lora_rt.core.step.fused import fuse
from lora_rt.core.step.loss import nll_at
from lora_rt.core.step.settings import Optimizer, TrainSettings

_STATE_BYTES = 8  # AdamW's two moments in float32, per trained weight
_STATE_BYTES_8BIT = 2 + 2 * 4 / 256  # the two moments in a byte each, a float32 scale for every 256 of them
_KEPT_IN_32_BIT = 4096  # bitsandbytes does not quantize the moments of parameters with fewer weights than this


@dataclass(frozen=True, slots=True)
class TrainingMemory:
    """Bytes. `activations` is the most that a step holds beside everything else; `workspace` an unpacked layer.

    `seen` is what runs on a CPU were measured to take beyond the tensors that are alive: from a process's first steps
    on, another copy of the logits in float32. What holds it was not found; see examples/memory.
    """

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int
    seen: int = 0

    @property
    def peak(self) -> int:
        return self.fixed + self.per_batch

    @property
    def per_batch(self) -> int:
        """What grows with rows and tokens."""
        return self.activations + self.seen

    @property
    def fixed(self) -> int:
        """What does not grow with the batch."""
        return self.weights + self.adapter + self.gradients + self.optimizer + self.workspace


def plan_training(
    config: Any,
    precision: Precision,
    device: Device,
    settings: TrainSettings,
    *,
    rows: int,
    tokens: int,
    labels: int,
    optimizer: Optimizer,
    checkpointing: bool,
    shards: int = 1,
) -> TrainingMemory:
    """The memory of a run whose backward passes are over (rows, tokens), with labels in `labels` of the columns.

    Args:
        shards: how many processes keep the blocks' frozen weights in parts; each brings two blocks together at a time.
    """

    def measure(base: Any, blocks: nn.ModuleList) -> tuple[int, ...]:
        model = with_adapter(base, settings, quietly=True).train()
        if checkpointing:
            checkpointed(model)
        if device == "cpu":
            attend_in_float32(model)
        else:
            _fuse_dropout(model)
        with FakeTensorMode(), FirstExpert():
            materialise(model, device, for_training=True)
            if device == "cpu":
                fuse(model, lambda: False)
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
            for parameter in trained:  # gradients are counted apart from the activations
                parameter.register_post_accumulate_grad_hook(_forget)
            with LiveMemory(resident(model)) as live:
                peaks = _step(model, blocks[-1], live, rows, tokens, labels)
            states = sum(_state_bytes(parameter.numel(), optimizer) for parameter in trained)
            adapter = sum(parameter.nbytes for parameter in trained)
            frozen = [sum(p.nbytes for p in block.parameters() if not p.requires_grad) for block in blocks]
            return bytes_of(model), adapter, states, sum(frozen), max(frozen), *peaks

    everything, adapter, states, blocks, largest, *peaks = over_blocks(config, precision, measure)
    elsewhere = blocks - blocks // shards
    return TrainingMemory(
        weights=everything - adapter - elsewhere,
        adapter=adapter,
        gradients=adapter,
        optimizer=states,
        activations=max(peaks),
        workspace=largest_dequantized(skeleton(config, precision), precision) + (2 * largest if shards > 1 else 0),
        seen=4 * rows * labels * int(config.get_text_config().vocab_size) if device == "cpu" else 0,
    )


def _state_bytes(weights: int, optimizer: Optimizer) -> int:
    eight = optimizer == "paged-adamw-8bit" and weights >= _KEPT_IN_32_BIT
    return round(weights * (_STATE_BYTES_8BIT if eight else _STATE_BYTES))


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


def _step(model: Any, last: nn.Module, live: LiveMemory, rows: int, tokens: int, labels: int) -> tuple[int, int, int]:
    """The peaks of forward pass, loss with its backward pass, and backward pass through the blocks.

    Each grows by the same with every block; which of them is the largest may depend on how many there are.
    """
    peaks: list[int] = []

    def watch(_module: nn.Module, _arguments: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad and not peaks:
            hidden.register_hook(lambda _gradient: peaks.append(live.restart()))

    handle = last.register_forward_hook(watch)
    ids = torch.zeros((rows, tokens), dtype=torch.long)
    columns = torch.arange(tokens - 1 - labels, tokens - 1)
    sums, counts = nll_at(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}, columns)
    handle.remove()
    peaks.append(live.restart())
    (sums.sum() / counts.sum().clamp(min=1)).backward()  # type: ignore[no-untyped-call]
    if len(peaks) < 2:  # no gradient goes through the last block: the adapter acts behind it, or elsewhere
        peaks.insert(0, peaks[0])
    return peaks[0], peaks[1], live.peak


class _FusedDropout(nn.Dropout):
    """Dropout as CUDA does it: what it keeps for the backward pass is one byte per value."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, self.p, self.training)[0]


def _fuse_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if type(module) is nn.Dropout and module.p > 0:
            module.__class__ = _FusedDropout
