"""From the rows of a pass to its plan: static weights once, gates anew for every pass.

Three rows in one pass, of which the second waits for "So:" and the third is under a context adapter:

    row 0   emotion:0.7 logic:0.3                   weights {emotion: 0.7, logic: 0.3}
    row 1   logic:0.5[So:], "So:" not yet read      weights {}          its phase before "So:"
    row 2   field:1                                 weights {field: 1}, and a gate (layers, rows, tokens, heads)

A pass of row 0 alone gets the plan that it had before, by the row's identity. Here row 1 is parted by token where "So:"
lies within the pass (`timeline.variants`), modes are asked for the gates of each phase, and `merging.merged` makes one
weight and one gate per adapter of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch

from lora_rt.core.base.shape import positions_of
from lora_rt.core.engine.bank import AdapterBank
from lora_rt.core.engine.plan import Plan
from lora_rt.core.engine.resident import ResidentAdapter
from lora_rt.core.forward.hidden_states import EarlyHidden, EarlyHistory
from lora_rt.core.generation.row import PassInfo
from lora_rt.core.requests.merging import merged
from lora_rt.core.requests.moded import ModedComposition
from lora_rt.core.requests.rows import Row
from lora_rt.core.requests.running import RequestRow
from lora_rt.core.requests.timeline import Variant, variants
from lora_rt.plugins.contract import BaseFacts, Gate, GateContext, JointGateContext
from lora_rt.plugins.manager import ModeHost

_REMEMBERED = 16  # plans without gates
Hidden = Callable[[int | None], torch.Tensor]
"""Depth -> the base's early hidden states of a pass, made once however often they are asked for."""


class RowPlanner:
    """The planner of one batch (see `lora_rt.core.generation.batch.Planner`); rows may come and go between passes."""

    def __init__(self, bank: AdapterBank, modes: ModeHost, base: BaseFacts, early: EarlyHidden) -> None:
        self._bank = bank
        self._modes = modes
        self._base = base
        self._early = EarlyHistory(early)
        self._static: dict[tuple[int, ...], tuple[Sequence[Row], Plan | None]] = {}

    def __call__(self, info: PassInfo, rows: Sequence[RequestRow]) -> Plan | None:
        """The plan of this pass, or None where it is the base's alone."""
        phases = _phases(info, rows)
        # One phase for all tokens, and no row whose weights vary by layer or are decided by a composition's mode.
        still = len(phases) == 1 and all(row.static for row in phases[0].rows)
        if still and (known := self._static.get(tuple(id(row) for row in phases[0].rows))) is not None:
            return known[1]
        adapters, phases = _named_apart(phases)
        if not still:
            weights, combined = self._merged(phases, adapters, info)
            return self._bank.plan(weights, combined, adapters)
        gates = self._gates(phases, adapters, info, self._hidden_of(info))
        weights = [dict(row.weights) for row in phases[0].rows]
        plan = self._bank.plan(weights, gates[0], adapters)
        if not gates[0]:  # no mode has a say: it is the same in the next pass
            if len(self._static) >= _REMEMBERED:
                self._static.clear()
            # The rows are kept beside it, so that no other can get their place in memory, and so their key.
            self._static[tuple(id(row) for row in phases[0].rows)] = phases[0].rows, plan
        return plan

    def alone(self, info: PassInfo, rows: Sequence[RequestRow]) -> dict[str, tuple[Gate, Plan]]:
        """Of each adapter of this pass, its gate with its weights in it, and a plan in which it acts alone."""
        adapters, phases = _named_apart(_phases(info, rows))
        weights, gates = self._merged(phases, adapters, info)
        plans = {n: self._bank.plan([{n: w.get(n, 0.0)} for w in weights], {n: g}, adapters) for n, g in gates.items()}
        return {name: (gates[name], plan) for name, plan in plans.items() if plan is not None}

    def _merged(
        self, phases: Sequence[Variant], adapters: Mapping[str, ResidentAdapter], info: PassInfo
    ) -> tuple[list[dict[str, float]], dict[str, Gate]]:
        hidden = self._hidden_of(info)
        own = self._gates(phases, adapters, info, hidden)
        mixed = self._moded_gates(phases, adapters, info, hidden)
        return merged(list(adapters), phases, own, mixed, self._bank.device)

    def _gates(
        self, phases: Sequence[Variant], adapters: Mapping[str, ResidentAdapter], info: PassInfo, hidden: Hidden
    ) -> list[dict[str, Gate | None]]:
        """What the modes say to this pass in each phase, by the name of each adapter that one of its rows uses."""
        gated = {name: one for name, one in adapters.items() if self._modes.gates_of(one.mode)}
        found = []
        for phase in phases:
            acting = {name: one for name, one in gated.items() if any(row.uses(name) for row in phase.rows)}
            asked = [(one.mode, self._context(name, one, phase.rows, info, hidden)) for name, one in acting.items()]
            found.append(dict(zip(acting, self._modes.gates(asked), strict=True)))
        return found

    def _moded_gates(
        self, phases: Sequence[Variant], adapters: Mapping[str, ResidentAdapter], info: PassInfo, hidden: Hidden
    ) -> list[list[tuple[ModedComposition, dict[str, Gate]]]]:
        """What the modes of named compositions say to this pass in each phase, by the names of their adapters."""
        found = []
        for phase in phases:
            # The same composition may stand over adapters that were loaded twice.
            own = dict.fromkeys((moded, tuple(names)) for row in phase.rows for moded, names in row.moded.items())
            found.append([(one, self._of_moded(one, names, phase.rows, adapters, info, hidden)) for one, names in own])
        return found

    def _of_moded(
        self,
        moded: ModedComposition,
        names: Sequence[str],
        rows: Sequence[Row],
        adapters: Mapping[str, ResidentAdapter],
        info: PassInfo,
        hidden: Hidden,
    ) -> dict[str, Gate]:
        depth = moded.card.get("hidden_layers")
        weights = [[row.moded.get(moded, {}).get(name, 0.0) for row in rows] for name in names]  # (names, rows)
        contexts = [
            replace(
                self._context(name, adapters[name], rows, info, hidden),
                active=[weight != 0.0 for weight in own],
                weights=own,
                **_early(info, partial(hidden, depth)),
            )
            for name, own in zip(names, weights, strict=True)
        ]
        gates = self._modes.mixture_gates(moded.mode, JointGateContext(contexts, moded.view(self._base)))
        return {name: gate or Gate() for name, gate in zip(names, gates, strict=True)}

    def _hidden_of(self, info: PassInfo) -> Hidden:
        """Early hidden states by depth, each computed once in a pass and when it is first asked for."""
        return cache(partial(self._hidden, info))

    def _context(
        self,
        name: str,
        adapter: ResidentAdapter,
        rows: Sequence[Row],
        info: PassInfo,
        hidden: Hidden,
    ) -> GateContext:
        return GateContext(
            adapter=adapter.name,
            card=adapter.card,
            state=adapter.state,
            base=self._base,
            rank=adapter.rank,
            uniform_rank=len(adapter.ranks) == 1,
            input_ids=info.ids,  # (rows, tokens)
            positions=info.positions,  # (rows, tokens)
            prompt_lengths=info.prompt_lengths,  # (rows,)
            active=[row.uses(name) for row in rows],
            scene_types=[row.scene_type for row in rows],
            prompts=[row.prompt for row in rows],
            weights=[row.weights.get(name, 0.0) for row in rows],
            **_early(info, partial(hidden, adapter.card.get("hidden_layers"))),
        )

    def _hidden(self, info: PassInfo, depth: int | None) -> torch.Tensor:
        """The early hidden states of all tokens so far, (rows, all tokens, hidden)."""
        return self._early(info.history, info.mask, positions_of(info.mask), info.ids.shape[1], depth)


def _early(info: PassInfo, history: Callable[[], torch.Tensor]) -> dict[str, Any]:
    """The early hidden states that a context gives: (rows, tokens, hidden) and (rows, all tokens, hidden)."""
    return {"hidden": lambda: history()[:, -info.ids.shape[1] :], "history": lambda: (history(), info.mask)}


def _phases(info: PassInfo, rows: Sequence[RequestRow]) -> list[Variant]:
    timelines = [row.timeline for row in rows]
    if all(timeline.still for timeline in timelines):
        return [Variant([timeline.row for timeline in timelines])]
    return variants(timelines, [[*row.ids, *row.answer] for row in rows], info.positions)


def _named_apart(phases: Sequence[Variant]) -> tuple[dict[str, ResidentAdapter], list[Variant]]:
    """The adapters of a pass by name, and the phases under these names.

    A row keeps the adapters that it began with. Where another row has since got another adapter of the same name, the
    later one is called otherwise in this pass.
    """
    table: dict[str, ResidentAdapter] = {}
    named = []
    for phase in phases:
        rows = []
        for row in phase.rows:
            taken = {n: f"{n}~{id(a)}" for n, a in row.adapters.items() if table.setdefault(n, a) is not a}
            rows.append(_renamed(row, taken) if taken else row)
            table.update(rows[-1].adapters)
        named.append(replace(phase, rows=rows))
    return table, named


def _renamed(row: Row, names: Mapping[str, str]) -> Row:
    return replace(
        row,
        adapters={names.get(name, name): adapter for name, adapter in row.adapters.items()},
        weights={names.get(name, name): weight for name, weight in row.weights.items()},
        layers={names.get(name, name): layers for name, layers in row.layers.items()},
        moded={moded: {names.get(name, name): w for name, w in own.items()} for moded, own in row.moded.items()},
    )
