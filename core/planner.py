"""From the rows of a request to the plan of each forward pass: static weights once, gates anew for every pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch

from lora_rt.core.engine.bank import AdapterBank
from lora_rt.core.engine.early import EarlyHidden
from lora_rt.core.engine.plan import Plan
from lora_rt.core.generation.batch import positions_of
from lora_rt.core.generation.decode import PassInfo
from lora_rt.core.requests import Row
from lora_rt.plugins.contract import BaseFacts, Gate, GateContext
from lora_rt.plugins.manager import ModeHost


class RowPlanner:
    """The planner of one batch of rows (see `lora_rt.core.generation.decode.Planner`)."""

    def __init__(
        self, rows: Sequence[Row], bank: AdapterBank, modes: ModeHost, base: BaseFacts, early: EarlyHidden
    ) -> None:
        self._rows = rows
        self._weights = [row.weights for row in rows]
        self._bank = bank
        self._residents = bank.residents  # as they are now: another thread may unload one while this request runs
        self._modes = modes
        self._base = base
        self._early = early
        self._static = bank.plan(self._weights, residents=self._residents)
        names = dict.fromkeys(name for row in rows for name, weight in row.weights.items() if weight != 0.0)
        self._gated = [name for name in names if modes.implements(self._residents[name].mode, "lora_rt_gate")]

    def __call__(self, info: PassInfo) -> Plan | None:
        """The plan of this pass, or None where it is the base's alone."""
        if not self._gated:
            return self._static
        hidden = cache(lambda: self._hidden(info))
        gates = {name: self._gate(name, info, hidden) for name in self._gated}
        if all(gate is None for gate in gates.values()):
            return self._static
        return self._bank.plan(self._weights, gates, self._residents)

    def _gate(self, name: str, info: PassInfo, hidden: Callable[[], torch.Tensor]) -> Gate | None:
        adapter = self._residents[name]
        context = GateContext(
            adapter=name,
            card=adapter.card,
            state=adapter.state,
            base=self._base,
            rank=adapter.rank,
            uniform_rank=len(adapter.ranks) == 1,
            input_ids=info.ids,
            positions=info.positions,
            prompt_lengths=info.prompt_lengths,
            active=[weights.get(name, 0.0) != 0.0 for weights in self._weights],
            scene_types=[row.scene_type for row in self._rows],
            hidden=hidden,
        )
        return self._modes.gate(adapter.mode, context)

    def _hidden(self, info: PassInfo) -> torch.Tensor:
        """The early hidden states of this pass's tokens, seen in the context of all tokens so far."""
        return self._early(info.history, info.mask, positions_of(info.mask))[:, -info.ids.shape[1] :]
