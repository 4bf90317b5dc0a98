"""From the rows of a request to the plan of each forward pass: static weights once, gates anew for every pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch

from lora_rt.core.engine.bank import AdapterBank
from lora_rt.core.engine.hidden_states import EarlyHidden
from lora_rt.core.engine.plan import Plan
from lora_rt.core.generation.batch import positions_of
from lora_rt.core.generation.decode import PassInfo
from lora_rt.core.requests.merging import merged
from lora_rt.core.requests.rows import Row
from lora_rt.core.requests.timeline import Timeline
from lora_rt.plugins.contract import BaseFacts, Gate, GateContext
from lora_rt.plugins.manager import ModeHost

Weights = Sequence[Mapping[str, float]]


class RowPlanner:
    """The planner of one batch of rows (see `lora_rt.core.generation.decode.Planner`)."""

    def __init__(
        self,
        rows: Sequence[Row],
        bank: AdapterBank,
        modes: ModeHost,
        base: BaseFacts,
        early: EarlyHidden,
        timeline: Timeline,
    ) -> None:
        self._bank = bank
        self._residents = bank.residents  # as they are now: another thread may unload one while this request runs
        self._modes = modes
        self._base = base
        self._early = early
        self._timeline = timeline
        self._names = list(dict.fromkeys(name for row in rows for name in row.names))
        self._gated = [name for name in self._names if modes.implements(self._residents[name].mode, "lora_rt_gate")]
        self._static: tuple[Weights, Plan | None] | None = None

    def __call__(self, info: PassInfo) -> Plan | None:
        """The plan of this pass, or None where it is the base's alone."""
        hidden = cache(lambda: self._hidden(info))
        variants = self._timeline.variants(info)
        gates = [self.gates(variant.rows, info, hidden) for variant in variants]
        if len(variants) == 1 and not any(row.layers for row in variants[0].rows):
            return self._simple([row.weights for row in variants[0].rows], gates[0])
        weights, combined = merged(self._names, variants, gates, self._bank.device)
        return self._bank.plan(weights, combined, self._residents)

    def combined(self, info: PassInfo) -> Mapping[str, Gate]:
        """The gate of each adapter in this pass with its weights in it."""
        hidden = cache(lambda: self._hidden(info))
        variants = self._timeline.variants(info)
        gates = [self.gates(variant.rows, info, hidden) for variant in variants]
        return merged(self._names, variants, gates, self._bank.device)[1]

    def gates(self, rows: Sequence[Row], info: PassInfo, hidden: Callable[[], torch.Tensor]) -> dict[str, Gate | None]:
        """What the modes say to this pass, by the name of each adapter that one of the rows uses."""
        return {
            name: self._gate(name, rows, info, hidden) for name in self._gated if any(_uses(row, name) for row in rows)
        }

    def _simple(self, weights: Weights, gates: Mapping[str, Gate | None]) -> Plan | None:
        if any(gate is not None for gate in gates.values()):
            return self._bank.plan(weights, gates, self._residents)
        if self._static is None or self._static[0] != weights:
            self._static = weights, self._bank.plan(weights, residents=self._residents)
        return self._static[1]

    def _gate(self, name: str, rows: Sequence[Row], info: PassInfo, hidden: Callable[[], torch.Tensor]) -> Gate | None:
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
            active=[_uses(row, name) for row in rows],
            scene_types=[row.scene_type for row in rows],
            prompts=[row.prompt for row in rows],
            hidden=hidden,
        )
        return self._modes.gate(adapter.mode, context)

    def _hidden(self, info: PassInfo) -> torch.Tensor:
        """The early hidden states of this pass's tokens, seen in the context of all tokens so far."""
        return self._early(info.history, info.mask, positions_of(info.mask))[:, -info.ids.shape[1] :]


def _uses(row: Row, name: str) -> bool:
    return row.weights.get(name, 0.0) != 0.0 or name in row.layers
