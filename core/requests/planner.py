"""From the rows of a pass to its plan: static weights once, gates anew for every pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial

import torch

from lora_rt.core.base.shape import positions_of
from lora_rt.core.engine.bank import AdapterBank, ResidentAdapter
from lora_rt.core.engine.hidden_states import EarlyHidden, EarlyHistory
from lora_rt.core.engine.plan import Plan
from lora_rt.core.generation.batch import PassInfo
from lora_rt.core.requests.merging import merged
from lora_rt.core.requests.rows import Row
from lora_rt.core.requests.running import RequestRow
from lora_rt.core.requests.timeline import Variant, variants
from lora_rt.plugins.contract import BaseFacts, Gate, GateContext
from lora_rt.plugins.manager import ModeHost

_REMEMBERED = 16  # plans without gates


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
        still = len(phases) == 1 and not any(row.layers for row in phases[0].rows)
        if still and (known := self._static.get(tuple(id(row) for row in phases[0].rows))) is not None:
            return known[1]
        adapters, phases = _named_apart(phases)
        gates = self._gates(phases, adapters, info)
        if not still:
            weights, combined = merged(list(adapters), phases, gates, self._bank.device)
            return self._bank.plan(weights, combined, adapters)
        weights = [dict(row.weights) for row in phases[0].rows]
        plan = self._bank.plan(weights, gates[0], adapters)
        if not gates[0]:  # no mode has a say: it is the same in the next pass
            if len(self._static) >= _REMEMBERED:
                self._static.clear()
            # The rows are kept beside it, so that no other can get their place in memory, and so their key.
            self._static[tuple(id(row) for row in phases[0].rows)] = phases[0].rows, plan
        return plan

    def combined(self, info: PassInfo, rows: Sequence[RequestRow]) -> Mapping[str, Gate]:
        """The gate of each adapter in this pass with its weights in it."""
        adapters, phases = _named_apart(_phases(info, rows))
        return merged(list(adapters), phases, self._gates(phases, adapters, info), self._bank.device)[1]

    def _gates(
        self, phases: Sequence[Variant], adapters: Mapping[str, ResidentAdapter], info: PassInfo
    ) -> list[dict[str, Gate | None]]:
        """What the modes say to this pass in each phase, by the name of each adapter that one of its rows uses."""
        hidden = cache(partial(self._hidden, info))
        gated = {name: one for name, one in adapters.items() if self._modes.gates_of(one.mode)}
        found = []
        for phase in phases:
            acting = {name: one for name, one in gated.items() if any(_uses(row, name) for row in phase.rows)}
            asked = [(one.mode, self._context(name, one, phase.rows, info, hidden)) for name, one in acting.items()]
            found.append(dict(zip(acting, self._modes.gates(asked), strict=True)))
        return found

    def _context(
        self,
        name: str,
        adapter: ResidentAdapter,
        rows: Sequence[Row],
        info: PassInfo,
        hidden: Callable[[int | None], torch.Tensor],
    ) -> GateContext:
        return GateContext(
            adapter=adapter.name,
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
            weights=[row.weights.get(name, 0.0) for row in rows],
            hidden=partial(hidden, adapter.card.get("hidden_layers")),
        )

    def _hidden(self, info: PassInfo, depth: int | None) -> torch.Tensor:
        """The early hidden states of this pass's tokens, seen in the context of all tokens so far."""
        return self._early(info.history, info.mask, positions_of(info.mask), info.ids.shape[1], depth)


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
    )


def _uses(row: Row, name: str) -> bool:
    return row.weights.get(name, 0.0) != 0.0 or name in row.layers
