"""The adapter bank: which adapters are resident in memory, and plans over those that a batch uses."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lora_rt.core.base.shape import device_of
from lora_rt.core.engine.fitting import fitted
from lora_rt.core.engine.lanes import LanePlan, Lanes, Membership, Spare, gather, pay_off
from lora_rt.core.engine.lru import LRUCache
from lora_rt.core.engine.pieces import OwnFactors
from lora_rt.core.engine.plan import Plan, base_alone
from lora_rt.core.engine.resident import BankError, ResidentAdapter, check_gates, check_heads, twins_of
from lora_rt.core.engine.shared import SharedPlan
from lora_rt.core.engine.site import hook_up, let_replace, pass_by
from lora_rt.core.engine.stack import Stack, stack
from lora_rt.core.engine.topology import survey
from lora_rt.core.engine.wrappers import bare_modules, wrappers_of
from lora_rt.plugins.contract import Gate
from lora_rt.registry.inspection.keys import renamed

_ROOM = 256 * 2**20  # bytes of stacks and lanes that are kept, or as many as the residents take themselves


class AdapterBank:
    """Residents over one model.

    Factors lie where their layer computes: in float32 on a CPU, where few rows make a bfloat16 matmul the slower one,
    and in the base's compute dtype on a GPU. Adding and removing replaces the table of residents; plans made before
    keep what they were made of.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self._model = model
        with ExitStack() as undo:
            undo.enter_context(pass_by(wrappers_of(model), self))
            with base_alone():
                self.topology = survey(model)
            undo.enter_context(hook_up(self.topology))
            self._hooks = undo.pop_all()
        self.device = device_of(model)
        self._computed = dtype
        self.dtype = self._dtype_on(self.device)
        self.residents: Mapping[str, ResidentAdapter] = {}
        self._laid_out = LRUCache()
        self._spare = Spare()
        self._own = OwnFactors(self.topology)
        self._lock = threading.Lock()

    def close(self) -> None:
        """Give the model its own layers back and forget all residents."""
        self._hooks.close()
        self.residents = {}
        self._laid_out = LRUCache()
        self._spare = Spare()

    def add(self, adapter: ResidentAdapter) -> None:
        """Make an adapter resident; one of the same name is replaced.

        Raises:
            BankError: a factor names no site of this model or has another shape, all of them listed.
        """
        modules = dict(bare_modules(self._model)) if adapter.whole else {}
        new_names = renamed(adapter.whole, modules)
        adapter = replace(adapter, whole={new_names.get(name, name): own for name, own in adapter.whole.items()})
        modules = {name: module for name, module in modules.items() if name in adapter.whole}
        resident = fitted(adapter, self.topology, modules, self._dtype_on)
        if modules:
            self._hooks.enter_context(let_replace(modules, self.topology))
        with self._lock:
            replaced = self.residents.get(adapter.name)
            self.residents = {**self.residents, adapter.name: resident}
        if replaced is not None:
            self._laid_out.drop(replaced)

    def remove(self, name: str) -> None:
        """Forget an adapter.

        Raises:
            BankError: it is not resident.
        """
        with self._lock:
            removed = _get(self.residents, name)
            self.residents = {key: value for key, value in self.residents.items() if key != name}
        self._laid_out.drop(removed)

    def nbytes_of(self, resident: ResidentAdapter) -> int:
        """The memory of an adapter: its factors, and the copy that steps read once they have."""
        return resident.nbytes + self._own.nbytes_of(resident)

    def plan(
        self,
        rows: Sequence[Mapping[str, float]],
        gates: Mapping[str, Gate | None] | None = None,
        residents: Mapping[str, ResidentAdapter] | None = None,
    ) -> Plan | None:
        """The plan of one batch, or None where no row uses an adapter.

        Args:
            rows: per row of the batch, resident name -> weight. A single row stands for a batch of any size.
            gates: resident name -> gate, for residents that have one.
            residents: the residents as they were when the request began, where they may have changed since.

        Raises:
            BankError: an adapter is not resident, a weight is too large, or a gate has another rank than its adapter.
        """
        least = torch.finfo(self.dtype).tiny  # what a tensor of weights would take for 0 is 0; what is no number is not
        rows = [{name: weight for name, weight in row.items() if not abs(weight) < least} for row in rows]
        # Sorted: however a request orders its terms, it finds what was laid out for the same adapters.
        names = sorted({name for row in rows for name in row})
        if not names:
            return None
        table = self.residents if residents is None else residents
        active = tuple(_get(table, name) for name in names)
        chosen = [(gates or {}).get(name) for name in names]
        check_gates(active, chosen)
        if any(gate is not None and gate.heads is not None for gate in chosen):
            # Not within the pass that first asks: to its own passes adapters would add what they are asked for there.
            with base_alone():
                _ = self.topology.heads
        check_heads(self.topology, active, chosen)
        weights = self._weights(names, rows)
        twins = twins_of(active, weights, chosen)
        members = tuple(tuple(k for k, name in enumerate(names) if name in row) for row in rows)
        ranks = [adapter.rank for adapter in active]
        plain = not twins and all(adapter.plain and not adapter.fused for adapter in active)
        if plain and all(gate is None for gate in chosen) and pay_off(ranks, members, self.device.type):
            # Where gradients may flow, a graph may hold what the lanes had after they are gone.
            lanes = partial(self._lanes, active, members, again=torch.is_inference_mode_enabled())
            return LanePlan(self.topology, active, weights, self._own, lanes)
        own = partial(self._own.pieces, active) if self.device.type == "cpu" else None
        return SharedPlan(self.topology, self._stack(active), weights, chosen, twins, own)

    def _weights(self, names: Sequence[str], rows: Sequence[Mapping[str, float]]) -> Tensor:
        """(rows, K), or (1, K) where all rows are alike."""
        alike = all(row == rows[0] for row in rows)
        table = [[row.get(name, 0.0) for name in names] for row in (rows[:1] if alike else rows)]
        largest = max(abs(weight) for row in table for weight in row)
        if not largest <= torch.finfo(self.dtype).max:
            raise BankError(f"the weight {largest:g} is too large to compute with", next_step="Use weights around 1")
        return torch.tensor(table, dtype=self.dtype, device=self.device)

    def _stack(self, active: tuple[ResidentAdapter, ...]) -> Stack:
        """The stacked factors of a set. That of one adapter shares its memory, where no two layers share an input."""

        def build() -> tuple[Stack, int]:
            built = stack(self.topology, [adapter.factors for adapter in active])
            return built, built.nbytes

        return self._laid_out.get(active, frozenset(active), build, self._room(), lambda: self._here(active))

    def _lanes(self, active: tuple[ResidentAdapter, ...], members: Membership, *, again: bool) -> Lanes:
        """The factors of a set as the rows of a batch use them, in memory that may be used again after them."""

        def build() -> tuple[Lanes, int]:
            spare = self._spare if again else None
            built = gather(self.topology, [adapter.factors for adapter in active], members, spare)
            return built, sum(tensor.nbytes for tensor in built.tensors())

        key = (active, members, again)
        return self._laid_out.get(key, frozenset(active), build, self._room(), lambda: self._here(active))

    def _here(self, active: tuple[ResidentAdapter, ...]) -> bool:
        return all(self.residents.get(adapter.name) is adapter for adapter in active)

    def _room(self) -> int:
        return max(_ROOM, sum(resident.nbytes for resident in self.residents.values()))

    def _dtype_on(self, device: torch.device) -> torch.dtype:
        return torch.float32 if device.type == "cpu" else self._computed


def _get(residents: Mapping[str, ResidentAdapter], name: str) -> ResidentAdapter:
    if name not in residents:
        names = ", ".join(sorted(residents)) or "none"
        raise BankError(f"no adapter {name!r} is resident; there are: {names}", next_step="Load it first")
    return residents[name]
