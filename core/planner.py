"""From the rows of a request to the plan of each forward pass: static weights once, gates anew for every pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lora_rt.core.engine.bank import AdapterBank
from lora_rt.core.engine.early import EarlyHidden
from lora_rt.core.engine.plan import Plan
from lora_rt.core.generation.decode import PassInfo
from lora_rt.core.requests import Row
from lora_rt.plugins.contract import BaseFacts, Gate, GateContext
from lora_rt.plugins.manager import ModeHost


class RowPlanner:
    """The planner of one batch of rows (see `lora_rt.core.generation.decode.Planner`)."""

    def __init__(self, rows: Sequence[Row], bank: AdapterBank, modes: ModeHost, base: BaseFacts, early: EarlyHidden) -> None:
        self._rows = rows
        self._bank = bank
        self._modes = modes
        self._base = base
        self._early = early
        names = dict.fromkeys(name for row in rows for name, weight in row.weights.items() if weight != 0.0)
        self._gated = [name for name in names if modes.implements(bank.residents[name].mode, "lora_rt_gate")]
        self._static = None if self._gated else bank.plan([row.weights for row in rows])

    def __call__(self, info: PassInfo) -> Plan | None:
        """The plan of this pass, or None where it is the base's alone."""
        if not self._gated:
            return self._static
        gates = {name: self._gate(name, info) for name in self._gated}
        return self._bank.plan([row.weights for row in self._rows], gates)

    def _gate(self, name: str, info: PassInfo) -> Gate | None:
        adapter = self._bank.residents[name]
        context = GateContext(
            adapter=name,
            card=adapter.card,
            state=adapter.state,
            base=self._base,
            rank=adapter.rank,
            input_ids=info.ids,
            positions=info.positions,
            prompt_lengths=info.prompt_lengths,
            active=[row.weights.get(name, 0.0) != 0.0 for row in self._rows],
            scene_types=[row.scene_type for row in self._rows],
            hidden=lambda: self._hidden(info),
        )
        gate = self._modes.call(adapter.mode, "lora_rt_gate", context=context)
        if gate is not None:
            self._check(adapter.mode, gate, adapter.rank, info)
        return gate if gate is None or isinstance(gate, Gate) else None

    def _hidden(self, info: PassInfo) -> torch.Tensor:
        """The early hidden states of this pass's tokens, seen in the context of all tokens so far."""
        history = info.history
        positions = (info.mask.long().cumsum(-1) - 1).clamp(min=0)
        return self._early(history, info.mask, positions)[:, -info.ids.shape[1] :]

    def _check(self, mode: str, gate: object, rank: int, info: PassInfo) -> None:
        """A gate that is no Gate, has another shape, or is not finite is its plugin's fault and named as such."""
        if not isinstance(gate, Gate):
            raise self._modes.broke(mode, "lora_rt_gate", f"it returned a {type(gate).__name__}, not a Gate")
        rows, tokens = info.ids.shape
        wanted = {"ranks": (self._base.layers, rows, tokens, rank), "heads": (self._base.layers, rows, tokens, self._base.heads)}
        for part, full in wanted.items():
            tensor = getattr(gate, part)
            if tensor is None:
                continue
            fits = tensor.dim() <= 4 and all(have in (1, want) for have, want in zip(reversed(tensor.shape), reversed(full), strict=False))
            if not fits:
                raise self._modes.broke(mode, "lora_rt_gate", f"{part} of shape {tuple(tensor.shape)} does not broadcast to {full}")
            if not bool(torch.isfinite(tensor).all()):
                raise self._modes.broke(mode, "lora_rt_gate", f"{part} holds numbers that are not finite")
