"""The gate on the rank axis while an adapter trains: PEFT knows none, so it multiplies what A gives, in every layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from lora_rt.plugins.contract import Objective


class RankGates:
    """Applies the objective's gates to a PEFT model. Outside of `over`, every gate is 1."""

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
